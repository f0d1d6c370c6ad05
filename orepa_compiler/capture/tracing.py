"""Tracing: the fx graph of a module's own forward, with its children as leaves."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

# What `x += y` and its kin call: they write over their first operand.
IN_PLACE_OPERATORS = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
)


def write_(x: Tensor, index: Any, value: Any) -> Tensor:
    """x, with x[index] = value done to it."""
    x[index] = value
    return x


class Proxy(fx.Proxy):
    """A proxy that records `x += y` and `x[i] = y` as what they are.

    fx alone would write down x + y, and refuse the other.
    """

    def __setitem__(self, index: Any, value: Any) -> None:
        written = self.tracer.create_proxy("call_function", write_, (self, index, value), {})
        self.node = written.node  # what reads it from here on reads it as it is now


def _in_place(function: Callable[..., object]) -> Callable[[fx.Proxy, object], fx.Proxy]:
    def record(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _function in IN_PLACE_OPERATORS:
    setattr(Proxy, f"__{_function.__name__}__", _in_place(_function))


class _ChildrenAreLeaves(fx.Tracer):
    """buffers: whether a buffer is a node of the graph also where no node uses it directly."""

    def __init__(self, *, buffers: bool = False) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)


def trace(module: nn.Module) -> fx.Graph | str:
    """The graph of the module's own forward, or why there is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript"
    if type(module).forward is nn.Sequential.forward and "forward" not in vars(module):
        return _chain(list(module._modules))
    graph = _traced(module, buffers=False)
    if isinstance(graph, str) or not (made := _made_up(graph)):
        return graph
    again = _traced(module, buffers=True)  # a tensor made of buffers is not the module's own
    for name in made:
        vars(module).pop(name, None)
    if isinstance(again, str):
        return _traced(module, buffers=False)
    return again


def _traced(module: nn.Module, *, buffers: bool) -> fx.Graph | str:
    try:
        return _ChildrenAreLeaves(buffers=buffers).trace(module)
    except Exception as error:  # a forward is the user's code: anything may come out of it
        message = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {message[:120]}"


def _made_up(graph: fx.Graph) -> list[str]:
    """The tensors that the forward computed while it was traced, and that now stand for it."""
    targets = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    return [target for target in targets if target.startswith("_tensor_constant")]


def _chain(names: list[str]) -> fx.Graph:
    """The graph that a trace of nn.Sequential gives, at a hundredth of its cost."""
    graph = fx.Graph()
    node = graph.placeholder("input")
    for name in names:
        node = graph.call_module(name, (node,))
    graph.output(node)
    return graph
