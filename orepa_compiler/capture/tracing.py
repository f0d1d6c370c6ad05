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
    """forward: the name of the method that runs. buffers: whether a buffer is a node of the graph
    also where no node uses it directly.
    """

    def __init__(self, *, forward: str = "forward", buffers: bool = False) -> None:
        super().__init__()
        self.traced_func_name = forward
        self.proxy_buffer_attributes = buffers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)


def trace(module: nn.Module) -> fx.Graph | str:
    """The graph of the module's own forward, or why there is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript"
    forward = _forward_name(module)
    if forward is None:
        return "a function took its place on this object"
    if getattr(type(module), forward) is nn.Sequential.forward:
        return _chain(list(module._modules))
    graph = _traced(module, forward, buffers=False)
    if isinstance(graph, str) or not (made := _made_up(graph)):
        return graph
    again = _traced(module, forward, buffers=True)  # a tensor made of buffers is no attribute
    for name in made:
        vars(module).pop(name, None)
    if isinstance(again, str):
        return _traced(module, forward, buffers=False)
    return again


def has_forward(module: nn.Module) -> bool:
    """Whether the module can be called: by its class, or by what was set on the object."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _forward_name(module: nn.Module) -> str | None:
    """The method of its class that the module runs when it is called, or None for another function.

    A module may choose: self.forward = self.forward_slow.
    """
    chosen = vars(module).get("forward")
    if chosen is None:
        return "forward"
    name = getattr(chosen, "__name__", "")
    is_method = getattr(chosen, "__self__", None) is module
    same = is_method and getattr(type(module), name, None) is getattr(chosen, "__func__", chosen)
    return name if same else None


def _traced(module: nn.Module, forward: str, *, buffers: bool) -> fx.Graph | str:
    try:
        return _ChildrenAreLeaves(forward=forward, buffers=buffers).trace(module)
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
