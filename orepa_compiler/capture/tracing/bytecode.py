"""What the code of a forward names: the functions it reaches, and the attributes it reads.

Read from its bytecode, so that nothing runs.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

_MOST_FUNCTIONS = 64
# What may follow where a module is put on the stack: its attribute is read, or it is a key.
_ASKS = ("LOAD_ATTR", "LOAD_METHOD", "BINARY_SUBSCR", "STORE_SUBSCR")


def functions_of(module: nn.Module, forward: str = "forward") -> list[FunctionType]:
    """The functions written in Python that a module's forward reaches, as far as names tell."""
    found: dict[int, FunctionType] = {}
    open_ends = [*_methods(module, forward)]
    while open_ends and len(found) < _MOST_FUNCTIONS:
        function = open_ends.pop()
        if id(function) in found or is_of_torch(function.__module__):
            continue
        found[id(function)] = function
        for name in names_in(function.__code__):
            open_ends += _methods(module, name)
            open_ends += functions_in(function.__globals__.get(name))
        for cell in function.__closure__ or ():
            open_ends += functions_in(cell_contents(cell))
    return list(found.values())


@cache
def names_in(code: CodeType) -> frozenset[str]:
    """The names that a function looks up: globals and attributes, strings for getattr too."""
    nested = [const for const in code.co_consts if isinstance(const, CodeType)]
    return texts_in(code).union(code.co_names, *map(names_in, nested))


@cache
def texts_in(code: CodeType) -> frozenset[str]:
    """The strings in a function that could be names, also in tuples and in functions inside."""
    found: set[str] = set()
    for const in code.co_consts:
        if isinstance(const, CodeType):
            found |= texts_in(const)
        for part in const if isinstance(const, (tuple, frozenset)) else (const,):
            if isinstance(part, str) and part.isidentifier():
                found.add(part)
    return frozenset(found)


def defaults_of(function: FunctionType) -> dict[str, Any]:
    """The parameters of a function that need not be given, each with what it is then."""
    code, positional = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    return {**dict(zip(names[::-1], positional[::-1], strict=False)),
            **(function.__kwdefaults__ or {})}  # fmt: skip


@cache
def names_read(code: CodeType) -> frozenset[str]:
    """The attributes that a function reads, and does not only set or count up."""
    nested = [const for const in code.co_consts if isinstance(const, CodeType)]
    names = set()
    for before, one in pairwise([None, *dis.get_instructions(code)]):
        # `self.count += 1` copies self, and reads the count for itself alone
        updates = before is not None and before.opname in ("COPY", "DUP_TOP")
        if one is not None and one.opname.startswith("LOAD_") and not updates:
            names.add(str(one.argval))
    return texts_in(code).union(names, *map(names_read, nested))


def type_reason(functions: list[FunctionType]) -> str | None:
    """Why these functions cannot be traced: they ask for a value's type in a way no trace answers.

    type(x), x.__class__ and `match x: case Tensor()` would be answered for the stand-in.
    """
    for function in functions:
        if _asks_for_type(function.__code__):
            return "it asks for the type of a value (type(x), x.__class__ or a match on classes)"
    return None


@cache
def _asks_for_type(code: CodeType) -> bool:
    loads = [i for i in dis.get_instructions(code) if i.opname.startswith(("LOAD_", "MATCH_CLASS"))]
    of_self = [i.opname.startswith("LOAD_FAST") and i.argval == "self" for i in loads]
    for index, one in enumerate(loads):
        before, after = of_self[index - 1 : index], of_self[index + 1 : index + 2]
        if one.opname == "MATCH_CLASS":
            return True
        if one.opname == "LOAD_ATTR" and one.argval == "__class__" and before != [True]:
            return True
        if one.opname == "LOAD_GLOBAL" and one.argval == "type" and after != [True]:
            return True
    return any(_asks_for_type(const) for const in code.co_consts if isinstance(const, CodeType))


def goes_inside(hook: FunctionType) -> bool:
    """Whether a hook does more with its module than ask for attributes, or use it as a key."""
    code = hook.__code__
    names = [name for name in code.co_varnames[: code.co_argcount] if name != "self"][:1]
    steps = [None, *dis.get_instructions(code)]
    for before, one, after in zip(steps, steps[1:], [*steps[2:], None], strict=False):
        assert one is not None
        if not one.opname.startswith("LOAD_") or one.argval not in names:
            continue
        is_asked = after is not None and after.opname.startswith(_ASKS)
        about = before is not None and before.argval in ("id", "type", "isinstance", "hash")
        if not (is_asked or about):
            return True
    return False


def _methods(module: nn.Module, name: str) -> Iterator[FunctionType]:
    """The functions that `self.name` may mean, those of base classes too (super())."""
    for cls in type(module).__mro__:
        value = vars(cls).get(name)
        for part in (value.fget, value.fset) if isinstance(value, property) else (value,):
            yield from functions_in(part)
    yield from functions_in(vars(module).get(name))


def functions_in(value: Any) -> Iterator[FunctionType]:
    """The function that a value is or calls, and those that it was made of by decorators."""
    if isinstance(value, (MethodType, staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, partial):
        value = value.func
    while isinstance(value, FunctionType):
        yield value
        value = getattr(value, "__wrapped__", None)


def cell_contents(cell: Any) -> Any:
    """What a variable around a function holds; None where it was never given a value."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def is_of_torch(home: str | None) -> bool:
    """Whether a module of Python belongs to torch or the standard library, by its name."""
    return (home or "").split(".")[0] in ("torch", "builtins", "typing", "collections", "math")
