"""What a forward computes from its own tensors, and what of it goes with a region."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from orepa_compiler.capture import capture
from orepa_compiler.capture.constants import as_tensor, constants_of, evaluated, with_constants
from orepa_compiler.capture.forwards import Forwards, with_trial_values
from orepa_compiler.capture.tracing.forward import trace
from orepa_compiler.errors import NotLinear
from orepa_compiler.passes import is_leaf

Run = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 13).reshape(3, 4))
        self.gain = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))
        self.register_buffer("offset", torch.tensor(0.5))
        self.conv = nn.Conv2d(4, 3, 1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def product_of(net: Net) -> tuple[fx.Node, frozenset[fx.Node]]:
    """The last factor of the forward's output, and the constants of the forward."""
    graph = trace(net)
    assert isinstance(graph, fx.Graph)
    output = next(iter(reversed(graph.nodes))).args[0]
    assert isinstance(output, fx.Node)
    factor = output.args[1]
    assert isinstance(factor, fx.Node)
    return factor, constants_of(graph)


CONSTANTS: dict[str, tuple[Run, Callable[[Any], Tensor]]] = {
    "a parameter": (lambda m, x: x * m.weight, lambda m: m.weight),
    "of a child": (lambda m, x: x * m.conv.weight, lambda m: m.conv.weight),
    "made of several": (
        lambda m, x: x * torch.einsum("oi,o->oi", m.weight, m.gain).exp(),
        lambda m: (m.weight * m.gain[:, None]).exp(),
    ),
    "of numbers alone": (lambda m, x: x * torch.ones(3).add(1), lambda m: torch.full((3,), 2.0)),
    "of buffers alone": (
        lambda m, x: x * torch.sqrt(m.offset + 1),
        lambda m: torch.sqrt(m.offset + 1),
    ),
    "its own shape": (
        lambda m, x: x * m.weight.reshape(m.weight.shape[1], m.weight.shape[0]),
        lambda m: m.weight.reshape(4, 3),
    ),
    "the width of the map": (
        lambda m, x: x * m.gain.view(1, x.size(1), 1, 1),
        lambda m: m.gain.view(1, 3, 1, 1),
    ),
    "the width, from its shape": (
        lambda m, x: x * m.gain.view(1, x.shape[1], 1, 1),
        lambda m: m.gain.view(1, 3, 1, 1),
    ),
    "cast as the map": (lambda m, x: x * m.gain.to(x.dtype), lambda m: m.gain),
    "cast to another": (lambda m, x: x * m.gain.to(torch.float16), lambda m: m.gain.half()),
    "cast as another": (lambda m, x: x * m.gain.type_as(m.weight), lambda m: m.gain),
}


@pytest.mark.parametrize(("run", "expected"), CONSTANTS.values(), ids=CONSTANTS)
def test_constants_are_computed(run: Run, expected: Callable[[Any], Tensor]) -> None:
    net = Net(run)
    node, constants = product_of(net)
    assert node in constants
    found = evaluated(node, lambda target: fx.graph_module._get_attr(net, target))
    assert found.dtype == expected(net).dtype
    assert torch.equal(found, expected(net))


OTHERS: dict[str, Run] = {
    "of the map": lambda m, x: x * m.weight.add(x),
    "of a child's output": lambda m, x: x * m.conv(x),
    "written over": lambda m, x: x * m.weight.mul_(2),
    "random": lambda m, x: x * torch.rand_like(m.weight),
    "dropped out": lambda m, x: x * F.dropout(m.weight, 0.5, True),
    "the height of the map": lambda m, x: x * m.gain.view(1, x.size(2), 1, 1),
    "the width, not for a view": lambda m, x: x * (m.gain + x.size(1)),
    "the shape of the map": lambda m, x: x * m.gain.expand(x.shape),
    "drawn while it was traced": lambda m, x: x * torch.rand(3).add(1),
    "of memory that was not set": lambda m, x: x * torch.empty(3).add(1),
}


@pytest.mark.parametrize("run", OTHERS.values(), ids=OTHERS)
def test_what_is_no_constant(run: Run) -> None:
    node, constants = product_of(Net(run))
    assert node not in constants


def test_constants_go_with_those_who_alone_need_them() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        gain = m.gain.exp()
        return (x * gain.view(-1, 1, 1)).relu() + gain.sum()

    graph = trace(Net(run))
    assert isinstance(graph, fx.Graph)
    mul = next(node for node in graph.nodes if node.name == "mul")
    names = [node.name for node in with_constants([mul], constants_of(graph))]
    assert names == ["view", "mul"]  # exp and gain are needed for the sum


def test_numbers_and_tensors_of_floating_point() -> None:
    half = as_tensor(0.5)
    assert half is not None
    assert half.dtype == torch.float64
    assert as_tensor(2) is not None
    assert as_tensor(torch.ones(2)) is not None
    assert [as_tensor(x) for x in (True, None, "a", torch.ones(2, dtype=torch.int64))] == [None] * 4


def forwards(run: Run) -> Forwards:
    net = Net(run)
    return Forwards(capture(net, training=False, is_leaf=is_leaf), net.get_submodule)


def test_a_constant_that_cannot_be_computed_says_why() -> None:
    reader = forwards(lambda m, x: x * m.weight.reshape(5, 5))
    graph = reader.graph("")
    assert graph is not None
    node = next(node for node in graph.nodes if node.name == "reshape")
    with pytest.raises(NotLinear) as caught:
        reader.constant("", node)
    assert caught.value.reason == (
        "what it takes cannot be computed ahead (RuntimeError: shape '[5, 5]' is invalid for input "
        "of size 12)"
    )


def test_arguments_are_given_back_with_their_constants_computed() -> None:
    reader = forwards(lambda m, x: x * m.gain)
    graph = reader.graph("")
    assert graph is not None
    node = next(node for node in graph.nodes if node.op == "get_attr")
    found = reader.constant("", [1, (node, "a")])
    assert found[0] == 1
    assert torch.equal(found[1][0], reader.read("").gain)  # type: ignore[arg-type]


def test_tried_values_are_the_same_by_any_path() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    read = with_trial_values(capture(net, training=False, is_leaf=is_leaf))
    outer, inner = read("0")[1], read("0.1")  # type: ignore[index]
    assert torch.equal(outer.running_var, inner.running_var)
    assert not torch.equal(inner.running_var, inner.running_mean)
    assert (inner.running_var >= 0.5).all()
