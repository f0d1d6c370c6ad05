"""Traces: writes into a map, and tensors that a forward makes of its buffers."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor, fx, nn

from orepa_compiler.capture import capture
from orepa_compiler.capture.tracing.forward import trace
from orepa_compiler.passes import is_leaf
from tests.operator_factories import random_tensor

fx.wrap("ceil")


class Net(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("variance", torch.tensor([0.5, 0.25]))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def traced(run: Callable[[Any, Tensor], Tensor]) -> tuple[nn.Module, fx.GraphModule]:
    net = Net(run)
    graph = trace(net)
    assert isinstance(graph, fx.Graph)
    return net, fx.GraphModule(net, graph)


def test_a_write_is_a_node_that_later_readers_read() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        before = y + 0
        y[:, 0] = m.gain
        y[:, -1:] = 7
        return y - before

    net, rewritten = traced(run)
    names = [node.name for node in rewritten.graph.nodes]
    assert names == ["x", "mul", "add", "gain", "write_", "write__1", "sub", "output"]
    sub = next(node for node in rewritten.graph.nodes if node.name == "sub")
    assert [arg.name for arg in sub.args] == ["write__1", "add"]
    x = random_tensor(3, 2, 2).float()
    assert torch.equal(rewritten(x.clone()), net(x.clone()))


def test_a_write_into_the_input_is_seen_outside() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x[0] = 1.0
        return x * 2

    _, rewritten = traced(run)
    x = torch.zeros(2, 2)
    rewritten(x)
    assert x[0, 0] == 1.0


def test_a_tensor_made_of_buffers_is_a_part_of_the_graph() -> None:
    net, rewritten = traced(lambda m, x: x * torch.sqrt(m.variance + 1))
    targets = [node.target for node in rewritten.graph.nodes if node.op == "get_attr"]
    assert targets == ["variance"]
    assert not [name for name in vars(net) if name.startswith("_tensor_constant")]


def test_a_forward_that_asks_a_buffer_for_a_number_is_still_traced() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return x * (torch.sqrt(m.variance) if len(m.variance) > 1 else 2)

    net, rewritten = traced(run)
    targets = [node.target for node in rewritten.graph.nodes if node.op == "get_attr"]
    assert targets == ["_tensor_constant0"]
    x = random_tensor(3, 2).float()
    assert torch.equal(rewritten(x), net(x))


def test_a_function_that_fx_wraps_is_itself_in_a_trace_inside_a_trace() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * ceil(x.shape[-1] / 2)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Rounded()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    graph = capture(Around(), training=False, is_leaf=is_leaf).graphs["inner"]
    assert ceil in [node.target for node in graph.nodes]
