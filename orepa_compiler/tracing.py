"""Tracing: the fx graph of a module's own forward, with its children as leaves."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx, nn

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


class Proxy(fx.Proxy):
    """A proxy that records `x += y` as what it is; fx alone would write down x + y."""


def _in_place(function: Callable[..., object]) -> Callable[[fx.Proxy, object], fx.Proxy]:
    def record(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _function in IN_PLACE_OPERATORS:
    setattr(Proxy, f"__{_function.__name__}__", _in_place(_function))


class _ChildrenAreLeaves(fx.Tracer):
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
    try:
        return _ChildrenAreLeaves().trace(module)
    except Exception as error:  # a forward is the user's code: anything may come out of it
        message = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {message[:120]}"


def _chain(names: list[str]) -> fx.Graph:
    """The graph that a trace of nn.Sequential gives, at a hundredth of its cost."""
    graph = fx.Graph()
    node = graph.placeholder("input")
    for name in names:
        node = graph.call_module(name, (node,))
    graph.output(node)
    return graph
