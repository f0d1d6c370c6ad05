"""A forward is traced as it is called: with the constants, types and returns of its calls."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from tests.norms import randomise_norms

Run = Callable[..., Any]
Pair = namedtuple("Pair", "first second")


class Block(nn.Module):
    """conv, act and norm, joined by a function; with an activation between them, none may fold."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.conv, self.act, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(3)
        self.run = run

    def forward(self, x: Any, other: Any = None, *args: Any, slow: bool = False) -> Any:
        return self.run(self, x, other, *args, slow=slow)


class Net(nn.Module):
    def __init__(self, call: Run, *runs: Run) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(run) for run in runs)
        self.call = call
        randomise_norms(self).eval()

    def forward(self, x: Tensor) -> Any:
        return self.call(self.blocks, x)


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def norms_left(net: nn.Module, inputs: Any = None) -> int:
    """Norms after collapse, which must keep the function."""
    deploy, batch = orepa.collapse(net, inputs=inputs), inputs or (images(),)
    torch.testing.assert_close(deploy(*batch), net(*batch))
    return sum(is_batch_norm(module) for module in deploy.modules())


def pair(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
    return self.norm(self.conv(x))


def act_without_other(self: Any, x: Any, other: Any, *rest: Any, **options: Any) -> Any:
    y = self.conv(x)
    return self.norm(self.act(y) if other is None else y)


def act_if_slow(self: Any, x: Any, other: Any, *rest: Any, slow: bool) -> Any:
    y = self.conv(x)
    return self.norm(self.act(y) if slow else y)


def act_if_more(self: Any, x: Any, other: Any, *rest: Any, slow: bool) -> Any:
    y = self.conv(x)
    return self.norm(self.act(y) if rest else y)


def act_on_tensors(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
    y = self.conv(x if isinstance(x, Tensor) else x[0])
    return self.norm(self.act(y) if isinstance(x, Tensor) else y)


def act_if_a_tensor(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
    y = self.conv(x if torch.is_tensor(x) else x[0])
    return self.norm(self.act(y) if torch.is_tensor(x) else y)


@pytest.mark.parametrize(
    ("run", "call", "left"),
    [
        (act_without_other, lambda b, x: b[0](x), 1),
        (act_without_other, lambda b, x: b[0](x, None), 1),
        (act_without_other, lambda b, x: b[0](x, other=x), 0),
        (act_if_slow, lambda b, x: b[0](x), 0),
        (act_if_slow, lambda b, x: b[0](x, slow=True), 1),
        (act_if_more, lambda b, x: b[0](x, x), 0),
        (act_if_more, lambda b, x: b[0](x, x, 3), 1),
        (act_on_tensors, lambda b, x: b[0](x), 1),
        (act_on_tensors, lambda b, x: b[0](x + 1), 1),
        (act_on_tensors, lambda b, x: b[0]([x, x]), 0),
        (act_on_tensors, lambda b, x: b[0]((x, x)), 0),
        (act_if_a_tensor, lambda b, x: b[0](x), 1),
        (act_if_a_tensor, lambda b, x: b[0]([x, x]), 0),
    ],
)
def test_a_forward_is_read_the_way_it_is_called(run: Run, call: Run, left: int) -> None:
    assert norms_left(Net(call, run)) == left


def test_a_forward_that_is_called_in_two_ways_is_not_read() -> None:
    net = Net(lambda b, x: b[0](x) + b[0](x, x), act_without_other)
    deploy = orepa.collapse(net)
    torch.testing.assert_close(deploy(images()), net(images()))
    (refusal,) = orepa.recorded_plans(deploy)[-1].refusals
    assert refusal.reason == (
        "the forward of blocks.0 cannot be traced (it is called in different ways; "
        "give inputs= to record a real forward)"
    )


def test_two_calls_that_make_no_difference_are_one_way() -> None:
    expected = orepa.plan(Net(lambda b, x: b[0](x) + b[0](x), pair))
    found = orepa.plan(Net(lambda b, x: b[0](x) + b[0](x, slow=True), pair))
    assert found == expected
    assert found.edits


@pytest.mark.parametrize(
    ("returned", "call", "left"),
    [
        (lambda y: (y, None), lambda y: y[1] is None, 1),
        (lambda y: (y, y), lambda y: y[1] is None, 0),
        (lambda y: {"a": y}, lambda y: isinstance(y, dict) and "a" in y, 1),
        (lambda y: [y], lambda y: len(y) > 1, 0),
        (lambda y: Pair(y, False), lambda y: y.second, 0),
        (lambda y: Pair(y, [False]), lambda y: not isinstance(y, Pair) or y.second[0], 0),
        (lambda y: y, lambda y: isinstance(y, tuple), 0),
    ],
)
def test_what_a_child_returns_is_known_to_its_caller(returned: Run, call: Run, left: int) -> None:
    def first(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
        return returned(self.act(x))

    def run(blocks: Any, x: Any) -> Any:
        y, two = blocks[0](x), blocks[1]
        return two.norm(two.act(two.conv(x)) if call(y) else two.conv(x))

    net = Net(run, first, pair)
    del net.blocks[0].conv, net.blocks[0].norm
    assert norms_left(net) == left


def test_what_a_module_without_layers_returns_is_known_too() -> None:
    class WithNone(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    def run(blocks: Any, x: Any) -> Any:
        _, extra = blocks[0].extra(x)
        y = blocks[0].conv(x)
        return blocks[0].norm(blocks[0].act(y) if extra is None else y)

    net = Net(run, pair)
    net.blocks[0].extra = WithNone()
    assert norms_left(net) == 1


def test_what_cannot_be_told_is_not_guessed() -> None:
    def guess(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
        y = self.conv(x)
        parts = torch.sort(y)
        return self.norm(y if isinstance(parts, tuple) else self.act(y)) + parts[0]

    net = Net(lambda b, x: b[0](x), guess)
    (refusal,) = orepa.recorded_plans(orepa.collapse(net))[-1].refusals
    assert "it asks for the type of a value that a trace does not know" in refusal.reason
    with torch.no_grad():
        assert norms_left(net, inputs=(images(),)) == 1  # sort and sum read the conv too


def test_an_argument_that_is_left_out_does_not_keep_a_sum_apart() -> None:
    net = Net(lambda b, x: b[0](x) + b[1](x), pair, pair)
    deploy = orepa.collapse(net)
    torch.testing.assert_close(deploy(images()), net(images()))
    assert sum(isinstance(module, nn.Conv2d) for module in deploy.modules()) == 1


@pytest.mark.parametrize("expanded", [False, True])
def test_the_layers_of_a_model_are_known_to_return_tensors(expanded: bool) -> None:
    def asks(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
        y = self.conv(x)
        z = self.norm(y if isinstance(y, Tensor) else self.act(y))
        return self.act(z) if isinstance(z, tuple) else z

    net = Net(lambda b, x: b[0](x), asks)
    net = orepa.expand(net).eval() if expanded else net
    assert norms_left(net) == 0


class Optional(nn.Module):
    """A model that adds up two convs, and does something else where a mask is given."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        randomise_norms(self).eval()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.one(x) + self.two(x)
        return self.norm(y) if mask is None else self.norm(y.relu()) * mask


def test_a_model_is_not_written_anew_for_one_of_the_ways_to_call_it() -> None:
    net = Optional()
    deploy = orepa.collapse(net)
    assert any(map(is_batch_norm, deploy.modules()))
    for given in ((images(),), (images(), torch.ones(1))):
        torch.testing.assert_close(deploy(*given), net(*given))


def test_inputs_say_how_a_model_is_called() -> None:
    net, batch = Optional(), (images(), torch.rand(1, 1, 6, 6))
    assert norms_left(net, inputs=batch) == 1
    both = orepa.collapse(net, inputs=[batch, images()])
    for given in (batch, (images(),)):
        torch.testing.assert_close(both(*given), net(*given))


def test_children_of_a_forward_that_fails_half_way_are_read_by_themselves() -> None:
    def half_way(blocks: Any, x: Any) -> Any:
        y = blocks[0](x, [x])
        return blocks[1](y) if y.sum() > 0 else y

    net = Net(half_way, act_without_other, pair)
    plain = orepa.collapse(net)
    torch.testing.assert_close(plain(images()), net(images()))
    assert sum(is_batch_norm(module) for module in plain.modules()) == 2
