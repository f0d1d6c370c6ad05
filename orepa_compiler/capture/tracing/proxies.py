"""Stand-ins for the values of a forward while it is traced, which answer as a tensor would.

What a stand-in cannot answer (which way an `if` goes, what number a map holds) ends the trace, also
where the forward catches the error: it would go on in a way that no real call may take.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import UnionType
from typing import Any

import torch
from torch import Tensor, fx

from orepa_compiler.capture.schemas import writes
from orepa_compiler.capture.tracing.kinds import inferred_type
from orepa_compiler.containers import members

# What `x += y` and its kin call: they write over their first operand.
IN_PLACE_OPERATORS = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
)
# Functions that make a tensor of numbers. They take no stand-in, so fx alone does not see them.
_FACTORIES = (
    "tensor", "as_tensor", "asarray", "arange", "linspace", "full", "zeros", "ones", "empty", "eye",
    "rand", "randn", "randint", "randperm", "from_numpy",
)  # fmt: skip
# Conversions by which Python would read the value of a tensor.
_CONVERSIONS = (
    "__int__", "__float__", "__complex__", "__index__", "__len__", "__array__", "__contains__",
    "__dlpack__",
)  # fmt: skip
_OF_A_PROXY = {"tracer", "node", "root", "attr", "_node"}

# What a weight says of its form is the same at each call, whatever its values are.
_OF_A_WEIGHT = {
    "shape", "ndim", "size", "dim", "ndimension", "numel", "nelement",
}  # fmt: skip

_isinstance, _hasattr, _getattr, _callable = (
    builtins.isinstance,
    builtins.hasattr,
    builtins.getattr,
    builtins.callable,
)


def write_(x: Tensor, index: Any, value: Any) -> Tensor:
    """x, with x[index] = value done to it."""
    x[index] = value
    return x


def set_attribute_(x: Tensor, name: str, value: Any) -> Tensor:
    """x, with x.name = value done to it."""
    setattr(x, name, value)
    return x


class Proxy(fx.Proxy):
    """A stand-in that records `x += y`, `x[i] = y` and `x.a = y` as what they are.

    fx alone would write down x + y, refuse the second, and forget the third.
    tracer: has `stopped`, `attributes_set` and `attribute_of` beside what fx asks of one.
    """

    tracer: Any

    def __setitem__(self, index: Any, value: Any) -> None:
        self._is_now(write_, index, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_A_PROXY:
            object.__setattr__(self, name, value)
            return
        self.tracer.attributes_set.add(name)
        self._is_now(set_attribute_, name, value)

    def _is_now(self, function: Callable[..., Tensor], *args: Any) -> None:
        """From here on, what reads it reads it as the function leaves it."""
        kind = inferred_type(self.node)
        written = self.tracer.create_proxy("call_function", function, (self, *args), {})
        written.node.meta["kind"] = kind
        self.node = written.node

    def __getattr__(self, name: str) -> Any:
        kind = inferred_type(self.node)
        if name in self.tracer.attributes_set:
            raise self.tracer.stopped(f"it asks for {name!r}, which some forward sets on a tensor")
        if name.startswith("__") and name.endswith("__"):
            if kind is None or _hasattr(kind, name):
                raise self.tracer.stopped(f"it asks for {name} of a value")
            raise AttributeError(name)
        if kind is not None and not _hasattr(kind, name):
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
        if name in _OF_A_WEIGHT and (weight := self.tracer.attribute_of(self.node)) is not None:
            return _getattr(weight, name)
        return Attribute(self, name)

    @classmethod
    def __torch_function__(
        cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None
    ) -> Any:
        """A function that is given a stand-in, as a node; also where it writes over a tensor."""
        args, kwargs = tuple(args or ()), dict(kwargs or {})
        name = str(_getattr(orig_method, "__name__", ""))
        if args and _isinstance(args[0], Tensor) and writes(name):
            found: list[Proxy] = []
            _find(found, (args[1:], kwargs))
            written = found[0].tracer.written_over(args[0])
            if written is not None and orig_method is Tensor.__setitem__:
                written[args[1]] = args[2]
                return None
            args = args if written is None else (written, *args[1:])
        out = kwargs.get("out")
        if _isinstance(out, Tensor):
            found = []
            _find(found, (args, kwargs))
            raise found[0].tracer.stopped("it writes over a tensor that is no value of its graph")
        return super().__torch_function__(orig_method, types, args, kwargs)


def _written(self: Proxy, *specification: Any) -> str:
    """As text: a number of a shape by its name, as in messages; the values of a map by nothing."""
    if inferred_type(self.node) is Tensor:
        raise self.tracer.stopped("it asks for the values of a tensor as text")
    return repr(self)


class Attribute(Proxy):
    """`x.name` before it is known whether it is read or called."""

    def __init__(self, root: Proxy, attr: str) -> None:
        self.root, self.attr = root, attr
        self.tracer = root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        if self._node is None:
            read = self.tracer.create_proxy("call_function", _getattr, (self.root, self.attr), {})
            self._node = read.node
        return self._node

    @node.setter
    def node(self, node: fx.Node) -> None:
        self._node = node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attr == "get_device" and not _hangs_on_input(self.root.node):
            return -1  # on which GPU a kernel is made decides nothing of what it is
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def _hangs_on_input(node: fx.Node) -> bool:
    """Whether a value is made of more than weights and numbers."""
    seen, open_ends = {node}, [node]
    while open_ends:
        value = open_ends.pop()
        if value.op in ("placeholder", "call_module"):
            return True
        new = [source for source in value.all_input_nodes if source not in seen]
        seen.update(new)
        open_ends += new
    return False


def _in_place(function: Callable[..., object]) -> Callable[[Proxy, object], fx.Proxy]:
    def record(self: Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


def _conversion(name: str) -> Callable[..., Any]:
    def refuse(self: Proxy, *args: Any, **kwargs: Any) -> Any:
        raise self.tracer.stopped(f"it asks for the value of a tensor ({name.strip('_')})")

    return refuse


for _function in IN_PLACE_OPERATORS:
    setattr(Proxy, f"__{_function.__name__}__", _in_place(_function))
for _name in ("__str__", "__format__"):
    setattr(Proxy, _name, _written)
for _name in _CONVERSIONS:
    setattr(Proxy, _name, _conversion(_name))


@contextmanager
def answering() -> Iterator[None]:
    """Python's own questions about a stand-in are answered for the value that it stands for.

    isinstance and its kin alone are told so, and never C++ code, which would take a stand-in that
    says it is a tensor for the memory of one.
    """
    if builtins.isinstance is _is_instance:  # a trace inside a trace
        yield
        return
    own = {name: _getattr(torch, name) for name in _FACTORIES}
    asked = {name: _getattr(builtins, name) for name in _QUESTIONS}
    try:
        vars(torch).update({name: _recording(factory) for name, factory in own.items()})
        vars(builtins).update(_QUESTIONS)
        yield
    finally:
        vars(builtins).update(asked)
        vars(torch).update(own)


def _asked_of_a_value(value: Any, caller: Any) -> bool:
    """Whether the forward that is traced asks about a stand-in, and not torch or this package."""
    if not _isinstance(value, Proxy):
        return False
    package = str(caller.f_globals.get("__name__", "")).split(".")[0]
    return package not in ("torch", "orepa_compiler") or caller.f_code.co_name == "is_tensor"


def _is_instance(value: Any, classes: Any) -> bool:
    if type(value) not in (Proxy, Attribute) or not _asked_of_a_value(value, sys._getframe(1)):
        return _isinstance(value, classes)
    if (held := value.tracer.attribute_of(value.node)) is not None:
        return _isinstance(held, classes)
    if kind := inferred_type(value.node):
        if not (is_one := issubclass(kind, classes)):
            value.tracer.is_none_of(value.node, _flat(classes))
        return is_one
    raise value.tracer.stopped("it asks for the type of a value that a trace does not know")


def _flat(classes: Any) -> tuple[type, ...]:
    """The classes in what isinstance takes: one, a tuple that may be nested, a union."""
    if _isinstance(classes, UnionType):
        classes = classes.__args__
    if _isinstance(classes, tuple):
        return tuple(cls for part in classes for cls in _flat(part))
    return (classes,) if _isinstance(classes, type) else ()


def _has_attribute(value: Any, name: str) -> bool:
    if type(value) in (Proxy, Attribute) and _asked_of_a_value(value, sys._getframe(1)):
        _check_known(value, name)
    return _hasattr(value, name)


def _get_attribute(value: Any, name: str, *default: Any) -> Any:
    if type(value) in (Proxy, Attribute) and default:
        _check_known(value, name)
    return _getattr(value, name, *default)


def _check_known(value: Proxy, name: str) -> None:
    if inferred_type(value.node) is None:
        raise value.tracer.stopped(f"it asks whether a value that a trace does not know has {name}")


def _is_callable(value: Any) -> bool:
    if type(value) in (Proxy, Attribute) and _asked_of_a_value(value, sys._getframe(1)):
        kind = inferred_type(value.node)
        return kind is None or any("__call__" in vars(cls) for cls in kind.__mro__)
    return _callable(value)


_QUESTIONS: dict[str, Any] = {
    "isinstance": _is_instance,
    "hasattr": _has_attribute,
    "getattr": _get_attribute,
    "callable": _is_callable,
}


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes a tensor, as a node of the graph where it is given stand-ins."""
    original = _getattr(function, "__wrapped__", function)  # a trace in a trace wraps once

    def make(*args: Any, **kwargs: Any) -> Any:
        found: list[Proxy] = []
        _find(found, (args, kwargs))
        if not found:
            return original(*args, **kwargs)
        return found[0].tracer.create_proxy("call_function", original, args, kwargs)

    make.__wrapped__ = original  # type: ignore[attr-defined]
    make.__name__ = original.__name__
    return make


def _find(found: list[Proxy], value: Any) -> None:
    if _isinstance(value, Proxy):
        found.append(value)
        return
    for part in members(value) or ():
        _find(found, part)
