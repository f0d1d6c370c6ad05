"""Constants of a forward: what it computes from parameters, buffers and numbers alone.

A kernel made of other tensors, a scale reshaped for a map, a norm's shift: the same at every call,
so it can be computed once, by running those nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from orepa_compiler.capture.kinds import READ
from orepa_compiler.errors import NotLinear

# Of a map, without a look at its values: known to be that of the constant beside it.
_FACTS = {"shape", "dtype", "device"}
_FORM = {"dtype", "device", "shape", "ndim", "size", "dim"}
_CASTS = {"to", "type_as"}
_VIEWS = {"view", "reshape", torch.reshape}
_RANDOM = ("rand", "dropout", "bernoulli", "normal_", "multinomial", "poisson")
_PURE = {"torch", "_operator", "builtins", "math"}
_WRITES = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__",
}  # fmt: skip


class _NoRandomNumbers(TorchDispatchMode):
    """Refuses to compute what is another at each call: operators that draw random numbers."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            name = getattr(func, "overloadpacket", func).__name__
            raise NotLinear(f"what it takes is drawn at random at each call ({name})")
        return func(*args, **(kwargs or {}))


def constants_of(graph: fx.Graph, written: Container[str] = ()) -> frozenset[fx.Node]:
    """The nodes whose values no input changes, with those that ask a map for its shape or dtype.

    written: tensors of the module that its forward changes, which are none.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_written = node.op == "get_attr" and str(node.target) in written
        if not is_written and _is_constant(node, found):
            found.add(node)
    return frozenset(found)


def evaluated(node: fx.Node, attribute: Callable[[str], Any]) -> Any:
    """The value of a constant node. attribute: gives the tensor of a get_attr node's target."""
    known: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in known:
            known[node] = _computed(node, value, attribute)
        return known[node]

    return value(node)


def with_constants(nodes: Iterable[fx.Node], constants: frozenset[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes in the order of their graph, with the constants that nobody else needs."""
    inside = set(nodes)
    order = {node: index for index, node in enumerate(next(iter(inside)).graph.nodes)}
    feeding: set[fx.Node] = set()
    open_ends = list(inside)
    while open_ends:
        new = constants.intersection(open_ends.pop().all_input_nodes) - feeding
        feeding |= new
        open_ends += new
    for node in sorted(feeding, key=order.__getitem__, reverse=True):
        if inside.issuperset(node.users):
            inside.add(node)
    return tuple(sorted(inside, key=order.__getitem__))


def reads_form(node: fx.Node) -> bool:
    """Whether a node asks for the form of a map or a weight, and for none of its values."""
    if node.op == "call_method":
        return node.target in _FORM
    return node.target is READ and node.args[1] in _FORM


def writes(node: fx.Node) -> bool:
    """Whether a call writes over its first operand, by its name: mul_, __setitem__, __iadd__."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


def _is_constant(node: fx.Node, found: set[fx.Node]) -> bool:
    if node.op == "get_attr":  # what a trace made up is not the module's own
        return not str(node.target).startswith("_tensor_constant")
    if node.op not in ("call_function", "call_method"):
        return False
    if _is_fact(node) or _is_width(node):
        return True
    name = str(getattr(node.target, "__name__", node.target))
    if writes(node) or not _is_pure(node) or any(word in name for word in _RANDOM):
        return False
    operands = node.all_input_nodes
    if node.target in _CASTS:
        return node.args[0] in found
    return bool(operands) and found.issuperset(operands)


def _is_pure(node: fx.Node) -> bool:
    """Whether a call gives the same for the same: not so a function of the user's, as it may be."""
    home = str(getattr(node.target, "__module__", None) or "torch")
    return node.op == "call_method" or home.partition(".")[0] in _PURE


def _is_fact(node: fx.Node) -> bool:
    """x.dtype, x.device, x.shape: for a cast, or for the width of a view."""
    if node.target is not READ or node.args[1] not in _FACTS:
        return False
    return node.args[1] != "shape" or all(map(_is_width, node.users))


def _is_width(node: fx.Node) -> bool:
    """x.size(1) or x.shape[1] of a map, for a view: where that is valid, -1 says the same."""
    if node.args[1:] != (1,) or not isinstance(source := node.args[0], fx.Node):
        return False
    asked = node.target == "size"
    if node.target is operator.getitem and source.target is READ:
        asked, source = source.args[1] == "shape", source.args[0]
    return (
        asked
        and not _is_made_of_constants(source)
        and all(user.target in _VIEWS for user in node.users)
    )


def _computed(
    node: fx.Node, value: Callable[[fx.Node], Any], attribute: Callable[[str], Any]
) -> Any:
    if node.op == "get_attr":
        return attribute(str(node.target))
    if _is_width(node):
        return -1
    if node.target in _CASTS and not _is_made_of_constants(node):
        return value(node.args[0])  # type: ignore[arg-type]
    args = fx.node.map_arg(node.args, value)
    kwargs = fx.node.map_arg(node.kwargs, value)
    call: Any = node.target
    with _NoRandomNumbers():
        if node.op == "call_method":
            return getattr(args[0], call)(*args[1:], **kwargs)
        return call(*args, **kwargs)


def _is_made_of_constants(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op == "get_attr":
        return True
    is_call = node.op in ("call_function", "call_method")
    return is_call and all(map(_is_made_of_constants, node.all_input_nodes))


def as_tensor(value: Any) -> Tensor | None:
    """A constant as float64, if it is a number or a tensor of floating point."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.float64)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None
