"""Tracing: the fx graph of a module's own forward, with its children as leaves."""

from __future__ import annotations

import operator
import sys
import textwrap
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from orepa_compiler.algebra.layers import is_activation, is_dropout, is_norm
from orepa_compiler.capture.arguments import Arguments, bound_forward, usual_arguments
from orepa_compiler.capture.effects import Effects
from orepa_compiler.capture.kinds import kind_of

# Gives what a child returns, from its path as the caller sees it and the arguments of the call:
# containers and constants with the nodes of the child's graph in them, or OPAQUE.
Returned = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]
OPAQUE = object()

_LONGEST = 120  # characters of an error that a forward raised
_CHECKED = (type(None), bool, int, float, str)

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
    """A proxy that records `x += y` and `x[i] = y` as what they are, and tells its value's type.

    fx alone would write down x + y, refuse the other, and answer isinstance for the proxy.
    """

    def __setitem__(self, index: Any, value: Any) -> None:
        written = self.tracer.create_proxy("call_function", write_, (self, index, value), {})
        self.node = written.node  # what reads it from here on reads it as it is now

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance asks for it where the type itself is no answer
        if _is_of_the_tracer(sys._getframe(1)):
            return type(self)
        if kind := kind_of(self.node):
            return kind
        raise fx.proxy.TraceError("it asks for the type of a value that a trace does not know")


def _is_of_the_tracer(caller: FrameType) -> bool:
    """Whether torch or this package asks, and not the forward that is traced."""
    package = str(caller.f_globals.get("__name__", "")).split(".")[0]
    return package in ("torch", "orepa_compiler") and caller.f_code.co_name != "is_tensor"


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

    def __init__(
        self,
        *,
        forward: str = "forward",
        buffers: bool = False,
        arguments: Arguments | None = None,
        returned: Returned | None = None,
        is_model: bool = False,
    ) -> None:
        super().__init__()
        self.traced_func_name = forward
        self.proxy_buffer_attributes = buffers
        self.arguments, self.returned = arguments or Arguments(), returned
        self.is_model = is_model  # who calls it is not known
        self.effects: Effects | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.effects is not None:
            self.effects.look()
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        function, given = super().create_args_for_root(root_fn, is_module, concrete_args)
        return function, [given[0], *map(self._argument, given[1:])]

    def _argument(self, proxy: Proxy) -> Any:
        """The constant that a parameter always is, or its proxy."""
        name = str(proxy.node.target)
        if name in self.arguments.constants:
            value = self.arguments.constants[name]
            if self.is_model and isinstance(value, _CHECKED):
                self._check(proxy, value)
            return value
        proxy.node.meta["kind"] = self.arguments.kinds.get(name)
        return proxy

    def _check(self, proxy: Proxy, value: Any) -> None:
        """What makes a forward that is written anew refuse other calls than the one traced."""
        test = operator.is_ if value is None else operator.eq
        same = self.create_proxy("call_function", test, (proxy, value), {})
        message = (
            f"this model's forward was written anew for calls with {proxy.node.target}={value!r}; "
            "give inputs= of the calls that you make"
        )
        self.create_proxy("call_function", torch._assert, (same, message), {})

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        proxy = super().call_module(m, forward, args, kwargs)
        value = OPAQUE if self.returned is None else self.returned(proxy.node.target, args, kwargs)
        if value is OPAQUE:
            proxy.node.meta["kind"] = _kind_from_leaf(m, args)
            return proxy
        return self._unpacked(proxy, value)

    def _unpacked(self, proxy: Proxy, value: Any) -> Any:
        """What a call gives: the containers and constants that the child makes, proxies inside."""
        value = _named_tuple(value)
        if isinstance(value, fx.Node):
            proxy.node.meta["kind"] = kind_of(value)
            return proxy
        if not isinstance(value, (tuple, list, dict)):
            return value
        proxy.node.meta["kind"] = type(value)
        keys = value if isinstance(value, dict) else range(len(value))
        parts = {key: self._unpacked(self._item(proxy, key), value[key]) for key in keys}
        if isinstance(value, dict):
            return parts
        is_named = hasattr(value, "_fields")
        return type(value)(*parts.values()) if is_named else type(value)(parts.values())

    def _item(self, proxy: Proxy, key: Any) -> Any:
        return self.create_proxy("call_function", operator.getitem, (proxy, key), {})


def _named_tuple(value: Any) -> Any:
    """A named tuple of nodes, where a node makes one; any other value as it is."""
    is_made = isinstance(value, fx.Node) and isinstance(value.target, type)
    if is_made and hasattr(value.target, "_fields"):
        return value.target(*value.args, **value.kwargs)
    return value


def _kind_from_leaf(module: nn.Module | None, args: Sequence[Any]) -> type | None:
    """The type of what a module without a graph returns."""
    if module is None or isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return tuple
    if isinstance(module, nn.Identity) and args and isinstance(args[0], fx.Proxy):
        return kind_of(args[0].node)
    is_layer = type(module).__module__.startswith("torch.nn.modules.") and not module._modules
    is_named = is_norm(module) or is_activation(module) or is_dropout(module)
    has_weights = any(True for _ in module.parameters())  # a conv of its own class, a block
    return Tensor if is_layer or is_named or has_weights else None


def trace(
    module: nn.Module,
    arguments: Arguments | None = None,
    returned: Returned | None = None,
    *,
    is_model: bool = False,
) -> fx.Graph | str:
    """The graph of the module's own forward, or why there is none.

    arguments: those of its calls; those of the usual call where nothing is known.
    returned: tells what a call of a child gives; without it, one value of an unknown type.
    is_model: whether it is the user who calls it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript"
    forward = _forward_name(module)
    if forward is None:
        return "a function took its place on this object"
    arguments = arguments or usual_arguments(bound_forward(module))
    if arguments is None:
        return "its arguments cannot be told from its signature"
    if getattr(type(module), forward) is nn.Sequential.forward:
        return _chain(module, arguments, returned)

    def traced(*, buffers: bool) -> fx.Graph | str:
        tracer = _ChildrenAreLeaves(
            forward=forward,
            buffers=buffers,
            arguments=arguments,
            returned=returned,
            is_model=is_model,
        )
        return _traced(tracer, module)

    graph = traced(buffers=False)
    if isinstance(graph, str) or not (made := made_up(graph)):
        return graph
    again = traced(buffers=True)  # a tensor made of buffers is no attribute
    for name in made:
        vars(module).pop(name, None)
    if isinstance(again, str):
        return traced(buffers=False)
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


def _traced(tracer: _ChildrenAreLeaves, module: nn.Module) -> fx.Graph | str:
    tracer.effects = Effects(module)
    try:
        with tracer.effects.watching():
            graph = tracer.trace(module)
    except Exception as error:  # a forward is the user's code: anything may come out of it
        message = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {textwrap.shorten(message, _LONGEST, placeholder=' ...')}"
    tracer.effects.note(graph)
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and not node.users:  # a part that nobody takes
            graph.erase_node(node)
        elif "is_wrapped" in node.meta:
            node.target = _unwrapped(node.target)
    return graph


def _unwrapped(function: Any) -> Any:
    """A function that fx wraps while it traces; a trace in a trace wraps it once more."""
    while getattr(function, "__globals__", {}).get("__name__") == fx._symbolic_trace.__name__:
        function = function.__wrapped__
    return function


def made_up(graph: fx.Graph) -> list[str]:
    """The tensors that the forward computed while it was traced, and that now stand for it."""
    targets = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    return [target for target in targets if target.startswith("_tensor_constant")]


def _chain(module: nn.Module, arguments: Arguments, returned: Returned | None) -> fx.Graph:
    """The graph that a trace of nn.Sequential gives, at a hundredth of its cost."""
    graph = fx.Graph()
    node = graph.placeholder("input")
    node.meta["kind"] = arguments.kinds.get("input")
    for name, child in module._modules.items():
        value = OPAQUE if returned is None else returned(name, (node,), {})
        before, node = node, graph.call_module(name, (node,))
        if isinstance(value, fx.Node):
            node.meta["kind"] = kind_of(value)
        elif value is not OPAQUE:
            node.meta["kind"] = type(value)
        elif isinstance(child, nn.Identity):
            node.meta["kind"] = kind_of(before)
        else:
            node.meta["kind"] = _kind_from_leaf(child, ())
    graph.output(node)
    return graph
