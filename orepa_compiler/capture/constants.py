"""Constants of a forward: what it computes from parameters, buffers and numbers alone.

A kernel made of other tensors, a scale reshaped for a map, a norm's shift: the same at every call,
so it can be computed once, by running those nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from orepa_compiler.capture.effects.nested import tensors
from orepa_compiler.capture.schemas import OF_SHAPE, draws, writes
from orepa_compiler.capture.tracing.kinds import READ
from orepa_compiler.capture.tracing.proxies import write_
from orepa_compiler.errors import NotLinear

# Of a map, without a look at its values: known to be that of the constant beside it.
_FACTS = {"shape", "dtype", "device"}
_CASTS = {"to", "type_as"}
_VIEWS = {"view", "reshape", torch.reshape}
_PURE = {"torch", "_operator", "builtins", "math"}
OF_NUMBERS = "of_numbers"  # the meta of a get_attr node that plain numbers were made for


class _Ahead(TorchDispatchMode):
    """Computes constants, of weights in float64, wherever these lie.

    Numbers that the forward makes itself are of the type and on the device that it says: they join
    the weights. Refuses what is another at each call: operators that draw random numbers.
    """

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
        given = [t for t in tensors((args, kwargs)) if t.is_floating_point()]
        is_mixed = len({(t.dtype, t.device) for t in given}) > 1
        if is_mixed and not func._schema.is_mutable:
            widest = _together(given)
            args, kwargs = tree_map_only(Tensor, widest, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _together(given: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Takes tensors to the widest of some types, and to where those that are not on the CPU lie."""
    dtype = reduce(torch.promote_types, (t.dtype for t in given))
    device = next((t.device for t in given if t.device.type != "cpu"), given[0].device)
    return lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype)


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
    """Whether a node asks a map or a weight for what follows from its shape, dtype and device.

    A rewritten layer answers the same; not so for its strides, or for whether it has gradients.
    """
    if node.op == "call_method":
        return node.target in OF_SHAPE
    return node.target is READ and node.args[1] in OF_SHAPE


def call_writes(node: fx.Node) -> bool:
    """Whether a call writes over its first operand, by its name: mul_, __setitem__, __iadd__."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return writes(name)


def writes_over_numbers(node: fx.Node) -> bool:
    """Whether a node writes into a tensor that the forward made of numbers, and nobody else sees.

    Such writes stand one behind the other, and each can be computed ahead like any constant.
    """
    target = node.args[0] if node.target is write_ else None
    if not isinstance(target, fx.Node):
        return False
    is_own = target.target is write_ or OF_NUMBERS in target.meta
    return is_own and list(target.users) == [node] and node.args[2] is not target


def _is_constant(node: fx.Node, found: set[fx.Node]) -> bool:
    if node.op == "get_attr":  # what a trace made up is not the module's own
        return OF_NUMBERS in node.meta or not str(node.target).startswith("_tensor_constant")
    if node.target is write_:
        return (
            writes_over_numbers(node)
            and node.args[0] in found
            and found.issuperset(node.all_input_nodes)
        )
    if node.op not in ("call_function", "call_method"):
        return False
    if _is_fact(node) or _is_width(node):
        return True
    name = str(getattr(node.target, "__name__", node.target))
    if call_writes(node) or not _is_pure(node) or draws(name):
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
        made = node.meta.get(OF_NUMBERS)
        return attribute(str(node.target)) if made is None else made.clone()
    if _is_width(node):
        return -1
    if node.target in _CASTS and not _is_made_of_constants(node):
        return value(node.args[0])  # type: ignore[arg-type]
    args: Any = fx.node.map_arg(node.args, value)
    kwargs = fx.node.map_arg(node.kwargs, value)
    call: Any = node.target
    if call is write_ and isinstance(args[2], Tensor):  # numbers become what is written over them
        args = (_together([args[0], args[2]])(args[0]), *args[1:])
    with _Ahead():
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
