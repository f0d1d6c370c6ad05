"""step_hooks: kernels made together in any loop, and everything else as in an ordinary step."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import orepa_compiler as orepa
from orepa_compiler import generation
from orepa_compiler.errors import ReparamError
from orepa_compiler.generation import store as kernel_store
from orepa_compiler.generation.together import _SqueezeTogether
from tests.operator_factories import random_tensor
from tests.training_nets import expanded_net, loss, optimizer_of


@pytest.fixture(autouse=True)
def each_is_one_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a block that is alone of its form is made with the others too."""
    monkeypatch.setattr(generation, "ALIKE", 1)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The blocks that made their kernels by themselves."""
    made: list[Any] = []

    def counted(block: Any) -> Any:
        made.append(block)
        return generation.generate(block)

    monkeypatch.setattr(kernel_store, "generate", counted)
    return made


def x(seed: int = 0) -> Tensor:
    return random_tensor(4, 3, 12, 12, seed=seed)


def assert_same_parameters(ours: nn.Module, theirs: nn.Module, *, grad: bool = False) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        left, right = (a.grad, b.grad) if grad else (a.detach(), b.detach())
        assert (left is None) == (right is None), name
        if left is not None and right is not None:
            assert float((left - right).abs().max()) <= 1e-12 * float(right.abs().max() + 1), name


def twins() -> tuple[nn.Module, nn.Module]:
    hooked = expanded_net()
    orepa.step_hooks(hooked)
    return hooked, expanded_net()


def plain_loop(net: nn.Module, optimizer: Any, seed: int) -> None:
    optimizer.zero_grad()
    loss(net, x(seed)).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()


def lightning_loop(net: nn.Module, optimizer: Any, seed: int) -> None:
    """zero_grad between forward and backward, inside of a closure."""

    def closure() -> Tensor:
        value = loss(net, x(seed))
        optimizer.zero_grad()
        value.backward()
        return value

    optimizer.step(closure)


def accumulating_loop(net: nn.Module, optimizer: Any, seed: int) -> None:
    for part in (0, 50):
        loss(net, x(seed + part)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def siamese_loop(net: nn.Module, optimizer: Any, seed: int) -> None:
    first, second = loss(net, x(seed)), loss(net, x(seed + 50))
    optimizer.zero_grad()
    second.backward(retain_graph=True)
    first.backward()
    second.backward()
    optimizer.step()


LOOPS: dict[str, Callable[[nn.Module, Any, int], None]] = {
    loop.__name__: loop for loop in (plain_loop, lightning_loop, accumulating_loop, siamese_loop)
}


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_trains_as_without(loop: str, alone: list[Any]) -> None:
    nets = twins()
    for number, net in enumerate(nets):
        optimizer = optimizer_of(net)
        for step in range(3):
            LOOPS[loop](net, optimizer, step)
        assert bool(alone) == bool(number), "kernels of the first net come from its hooks"
    assert_same_parameters(*nets)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_run_blocks_again(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = expanded_net()

        def forward(self, given: Tensor) -> Tensor:
            middle = checkpoint(self.net[:6], given, use_reentrant=use_reentrant)  # type: ignore[index]
            return self.net[6:](middle)  # type: ignore[index]

    hooked, ordinary = Checkpointed(), expanded_net()
    orepa.step_hooks(hooked)
    for net in (hooked, ordinary):
        for step in range(2):
            loss(net, x(step).requires_grad_()).backward()
    assert_same_parameters(hooked, ordinary, grad=True)


def test_a_part_that_is_run_by_itself_makes_its_own(alone: list[Any]) -> None:
    hooked, ordinary = twins()
    for net in (hooked, ordinary):
        losses = [loss(net, x()), net[:6](x(1)).square().mean()]  # type: ignore[index]
        for value in losses:
            value.backward()
    assert len(alone) == 2 + 3 + 2
    assert_same_parameters(hooked, ordinary, grad=True)


def test_an_error_in_a_forward_closes_what_it_opened(alone: list[Any]) -> None:
    hooked, ordinary = twins()
    with pytest.raises(RuntimeError):
        hooked(x()[:, :2])
    for net in (hooked, ordinary):
        net[:6](x()).mean().backward()  # type: ignore[index]
    assert len(alone) == 4
    assert_same_parameters(hooked, ordinary, grad=True)


def test_parameters_that_change_between_forwards(alone: list[Any]) -> None:
    hooked, ordinary = twins()
    for net in (hooked, ordinary):
        loss(net, x())
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1)
        loss(net, x()).backward()
    assert_same_parameters(hooked, ordinary, grad=True)


def test_evaluation_frozen_blocks_and_kernels_once() -> None:
    hooked, ordinary = twins()
    for net in (hooked, ordinary):
        net[0].requires_grad_(False)  # type: ignore[index]
        with orepa.kernels_once(net):
            loss(net, x(1)).backward()
        loss(net, x(2)).backward()
    assert_same_parameters(hooked, ordinary, grad=True)
    with torch.no_grad():
        torch.testing.assert_close(hooked.eval()(x()), ordinary.eval()(x()))


def test_copies_files_and_collapse_take_the_hooks_along(alone: list[Any]) -> None:
    hooked = expanded_net()
    hooks = orepa.step_hooks(hooked)
    loss(hooked, x())
    file = io.BytesIO(pickle.dumps(hooked))
    for net in (copy.deepcopy(hooked), pickle.load(file)):
        loss(net, x()).backward()
        assert alone == []
    assert orepa.verify(hooked.eval(), orepa.collapse(hooked), x())
    hooks.remove()
    alone.clear()
    loss(hooked.train(), x()).backward()
    assert len(alone) == 3


def test_a_compiled_model_sees_plain_operations() -> None:
    torch._dynamo.reset()
    hooked, ordinary = twins()
    compiled = torch.compile(hooked, backend="eager")
    loss(compiled, x()).backward()
    loss(ordinary, x()).backward()
    assert_same_parameters(hooked, ordinary, grad=True)


def test_second_derivatives() -> None:
    found = []
    for net in twins():
        given = x().requires_grad_()
        (grad,) = torch.autograd.grad(loss(net, given), given, create_graph=True)
        grad.square().sum().backward()
        found.append(net)
    assert_same_parameters(*found, grad=True)


def test_what_is_refused() -> None:
    net = expanded_net()
    with pytest.raises(ReparamError, match=r"^Sequential has no squeezed block"):
        orepa.step_hooks(orepa.collapse(net))
    with orepa.step_hooks(net):
        with pytest.raises(ReparamError) as error:
            orepa.step_hooks(net)
        assert str(error.value) == (
            "Sequential has step_hooks already; remove() those, or keep them"
        )
    orepa.step_hooks(net)


def test_the_test_would_see_a_function_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    apply = _SqueezeTogether.apply
    monkeypatch.setattr(_SqueezeTogether, "apply", lambda *a: calls.append(a) or apply(*a))
    hooked, _ = twins()
    loss(hooked, x())
    assert len(calls) >= 1
