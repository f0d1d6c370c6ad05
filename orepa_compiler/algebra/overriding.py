"""Tells whether a layer of torch runs as torch wrote it, or something of a user's is in the way.

A forward uses methods, properties and attributes of its layer. A subclass, or the object, that has
one of these names for itself computes another function, whatever its class is called.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

_HOME = "torch.nn.modules."
# Looked up on the type by Python itself, and so named in no code.
_IMPLICIT = frozenset({"__call__", "__getattr__", "__getattribute__", "__iter__", "forward"})
_FORWARDS = {"forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl"}


def has_torch_forward(layer: nn.Module) -> bool:
    """Whether a layer of torch, or a subclass, computes what torch's own forward computes."""
    home = type(layer).forward.__module__ or ""  # a forward that was made of a string has none
    return home.startswith(_HOME) and overridden(layer) is None


def overriding_reason(layer: nn.Module) -> str | None:
    """Why a layer does not compute what the layer of torch does that it is one of, or None."""
    if has_torch_forward(layer):
        return None
    name, kind = overridden(layer), type(layer).__name__
    if name is None or name in _FORWARDS:
        return f"{kind} has a forward of its own"
    return f"{kind} has a {name} of its own, which the forward of its base class uses"


def answers_itself(layer: nn.Module) -> bool:
    """Whether a user's class, and not torch's, tells what the attributes of a layer are."""
    users = [c for c in type(layer).__mro__ if not c.__module__.startswith("torch.")]
    names = {"__getattr__", "__getattribute__", "__setattr__"}
    return any(names & vars(c).keys() for c in users if c is not object)


def overridden(layer: nn.Module) -> str | None:
    """A name that the forward of torch's layer uses, and that stands for something else here."""
    cls = type(layer)
    base = next(c for c in cls.__mro__ if c.__module__.startswith(_HOME))
    used = _used_names(base)
    if cls is not base:
        users = (c for c in cls.__mro__ if not c.__module__.startswith("torch."))
        found = [name for c in users if c is not object for name in vars(c) if name in used]
        if found:
            return min(found, key=lambda name: (name not in _FORWARDS, name))
    return next(iter(_methods(base) & vars(layer).keys()), None)


@cache
def _methods(base: type) -> frozenset[str]:
    """Those of the names that are methods or properties, and no values that a layer sets itself."""
    members = {name: inspect.getattr_static(base, name, None) for name in _used_names(base)}
    return frozenset(n for n, m in members.items() if callable(m) or isinstance(m, property))


@cache
def _used_names(base: type) -> frozenset[str]:
    """The attributes that a call of a layer looks up, in all methods that it goes through."""
    found: set[str] = set()
    open_ends = set(_IMPLICIT)
    while open_ends:
        name = open_ends.pop()
        found.add(name)
        member: Any = inspect.getattr_static(base, name, None)
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if code := getattr(function, "__code__", None):
            open_ends |= set(_attributes(code)) - found
    return frozenset(n for n in found if n in _IMPLICIT or not n.startswith("__"))


def _attributes(code: CodeType) -> Iterator[str]:
    """The names of attributes in a function, and in the functions inside it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _attributes(constant)
