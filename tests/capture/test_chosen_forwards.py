"""Modules that run another forward than their class's: a method they chose, or a function set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.errors import ReparamError
from tests.norms import randomise_norms


class Chooses(nn.Module):
    """Two ways to run: with what norm and conv make one conv, and with an activation between."""

    def __init__(self, way: str | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        if way is not None:
            self.forward = getattr(self, way)
        randomise_norms(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def apart(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.conv(x)))

    def together(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class OnlyChosen(Chooses):
    """No forward in the class: it is there once the object has chosen."""

    forward = nn.Module.forward


def apart(self: Any, x: Tensor) -> Tensor:
    return Chooses.apart(self, x)


def as_method(net: nn.Module) -> Any:
    return MethodType(apart, net)


def as_partial(net: nn.Module) -> Any:
    return partial(apart, net)


def as_closure(net: nn.Module) -> Any:
    return lambda x: apart(net, x)


def as_wrapped(net: nn.Module) -> Any:
    """As torch.autocast and others wrap a forward."""
    inner = net.forward

    def forward(x: Tensor) -> Tensor:
        return inner(x)

    return forward


def as_wrapped_method(net: nn.Module) -> Any:
    function = as_wrapped(net)
    return MethodType(lambda self, x: function(x), net)


def inputs() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def norms_left(net: nn.Module, **options: Any) -> int:
    """Norms after collapse, which must keep the function."""
    expected, deploy = net(inputs()), orepa.collapse(net, **options)
    torch.testing.assert_close(deploy(inputs()), expected)
    return sum(is_batch_norm(module) for module in deploy.modules())


@pytest.mark.parametrize("kind", [Chooses, OnlyChosen])
@pytest.mark.parametrize(("way", "left"), [("together", 0), ("apart", 1)])
def test_the_method_that_a_module_chose_is_the_one_read(
    kind: type[Chooses], way: str, left: int
) -> None:
    assert norms_left(kind(way)) == left
    assert norms_left(nn.Sequential(kind(way))) == left


def test_a_conv_in_a_chosen_forward_is_expanded() -> None:
    plan = orepa.plan(nn.Sequential(OnlyChosen("together"), nn.ReLU()))
    assert [edit.path for edit in plan.of("expand").edits] == ["0.conv"]


@pytest.mark.parametrize("made", [as_method, as_partial])
def test_a_function_in_the_place_of_a_forward_is_seen_by_recording_alone(
    made: Callable[[nn.Module], Any],
) -> None:
    net = Chooses()
    net.forward = made(net)
    (refusal,) = orepa.recorded_plans(orepa.collapse(net))[-1].refusals
    assert refusal.reason == (
        "the forward of the model cannot be traced (a function took its place on this object; "
        "give inputs= to record a real forward)"
    )
    assert norms_left(net, inputs=inputs()) == 1


def test_a_sequence_in_whose_place_a_function_runs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    randomise_norms(net)
    net.forward = MethodType(lambda self, x: self[1](self[0](x).relu()), net)
    assert norms_left(net) == 1
    assert norms_left(net, inputs=inputs()) == 1


@pytest.mark.parametrize("made", [as_closure, as_wrapped, as_wrapped_method])
@pytest.mark.parametrize("verb", [orepa.expand, orepa.collapse])
def test_a_function_that_a_copy_would_share_is_refused(
    verb: Callable[..., nn.Module], made: Callable[[nn.Module], Any]
) -> None:
    net = nn.Sequential(Chooses(), nn.ReLU())
    net[0].forward = made(net[0])
    with pytest.raises(ReparamError) as caught:
        verb(net, inputs=inputs())
    assert str(caught.value) == (
        "0: its attribute 'forward' is a function that holds on to this very model, so a copy of "
        "the model would run the layers of the original; pass inplace=True, or make the function "
        "a method of the class"
    )


class Counting(nn.Module):
    """Wraps a method of its own on each object, and makes the wrapper anew in a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.update = as_wrapped_method(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "update"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.update = as_wrapped_method(self)


def test_a_function_that_a_copy_makes_anew_is_its_own() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    net[0].metric = Counting()
    made = orepa.collapse(net)
    assert norms_left(net) == 0
    orepa.expand(net)
    assert any(type(module) is nn.Conv2d for module in made.modules())


@pytest.mark.parametrize("made", [as_closure, as_wrapped])
def test_in_place_such_a_function_runs_the_new_layers(
    made: Callable[[nn.Module], Any],
) -> None:
    net = Chooses("together")
    net.forward = made(net)
    expected, parts = net(inputs()), sum(1 for _ in net.modules())
    expanded = orepa.expand(net, inputs=inputs(), where="**", inplace=True)
    assert expanded is net
    assert sum(1 for _ in net.modules()) > parts
    torch.testing.assert_close(net.eval()(inputs()), expected)
    net(inputs()).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_other_functions_on_a_module_are_no_obstacle() -> None:
    net = Chooses()
    net.helper = lambda x: x + 1
    net.loss = partial(torch.nn.functional.cross_entropy, label_smoothing=0.1)
    net.chosen = net.together
    assert norms_left(net) == 0
