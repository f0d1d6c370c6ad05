"""The state of Python that a forward may read or change: attributes, globals, variables around it.

A graph holds none of it. Where a forward changes something that some forward reads, the next call
may go another way than the one that was traced.
"""

from __future__ import annotations

import dis
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

OWN = ("_parameters", "_buffers", "_modules")
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_MADE_BY_TRACE = "_tensor_constant"
_DEEPEST, _MOST_FUNCTIONS, _MOST_FACTS = 4, 64, 2000


@dataclass
class Visible:
    """What a forward can see: name -> a fact to compare, the value, and who holds it.

    homes: name -> the objects and variables that hold the value, so that forwards which see the
    same ones are known.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    homes: dict[str, set[Hashable]] = field(default_factory=dict)

    def add(self, name: str, value: Any, home: Hashable = None) -> None:
        held: set[Hashable] = set() if home is None else {home}
        self.facts[name] = _fact(value, held, 0)
        self.values[name], self.homes[name] = value, held

    @property
    def all_homes(self) -> set[Hashable]:
        return set().union(*self.homes.values())


def visible_to(module: nn.Module, functions: list[FunctionType]) -> Visible:
    """What the functions that a module's forward reaches can see of the state of Python."""
    seen = Visible()
    for name, value in vars(module).items():
        if name not in OWN and not name.startswith(_MADE_BY_TRACE):
            seen.add(f"its {name}", value)
    for cls in type(module).__mro__:
        if not _is_of_torch(cls.__module__) and cls is not object:
            for name, value in vars(cls).items():
                if isinstance(value, (*_PLAIN, list, dict, set)) and not name.startswith("__"):
                    seen.add(f"{name} of its class", value, (id(cls), name))
    for function in functions:
        around = function.__globals__
        for name in names_in(function.__code__):
            if name in around and _is_state(value := around[name]):
                seen.add(f"the global {name}", value, (id(around), name))
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            if name != "__class__" and _is_state(value := _contents(cell)):
                seen.add(f"{name}, a variable around its forward", value, id(cell))
    return seen


def _fact(value: Any, held: set[Hashable], depth: int) -> Any:
    """Something to compare in place of a value; what holds its parts is added to `held`."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        held.add(id(value))
        return id(value), 0 if value.is_inference() else value._version
    parts = _parts(value)
    if parts is None or depth == _DEEPEST or len(held) > _MOST_FACTS:
        return id(value)
    held.add(id(value))
    return id(value), tuple((key, _fact(part, held, depth + 1)) for key, part in parts)


def functions_of(module: nn.Module, forward: str = "forward") -> list[FunctionType]:
    """The functions written in Python that a module's forward reaches, as far as names tell."""
    found: dict[int, FunctionType] = {}
    open_ends = [*_methods(module, forward)]
    while open_ends and len(found) < _MOST_FUNCTIONS:
        function = open_ends.pop()
        if id(function) in found or _is_of_torch(function.__module__):
            continue
        found[id(function)] = function
        for name in names_in(function.__code__):
            open_ends += _methods(module, name)
            open_ends += _functions(function.__globals__.get(name))
        for cell in function.__closure__ or ():
            open_ends += _functions(_contents(cell))
    return list(found.values())


@cache
def names_in(code: CodeType) -> frozenset[str]:
    """The names that a function looks up: globals and attributes, strings for getattr too."""
    nested = [const for const in code.co_consts if isinstance(const, CodeType)]
    texts = [const for const in code.co_consts if isinstance(const, str) and const.isidentifier()]
    return frozenset(code.co_names).union(texts, *map(names_in, nested))


@cache
def names_read(code: CodeType) -> frozenset[str]:
    """The attributes that a function reads, and does not only set or count up."""
    nested = [const for const in code.co_consts if isinstance(const, CodeType)]
    texts = [const for const in code.co_consts if isinstance(const, str) and const.isidentifier()]
    names = set()
    for before, one in pairwise([None, *dis.get_instructions(code)]):
        # `self.count += 1` copies self, and reads the count for itself alone
        updates = before is not None and before.opname in ("COPY", "DUP_TOP")
        if one is not None and one.opname.startswith("LOAD_") and not updates:
            names.add(str(one.argval))
    return frozenset(names).union(texts, *map(names_read, nested))


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
    for before, one in pairwise([None, *loads]):
        assert one is not None
        of_self = before is not None and before.argval == "self"
        if one.opname == "MATCH_CLASS" or (one.argval == "__class__" and not of_self
                                           and one.opname == "LOAD_ATTR"):  # fmt: skip
            return True
    for one, after in pairwise([*loads, None]):
        assert one is not None
        of_self = after is not None and (after.opname, after.argval) == ("LOAD_FAST", "self")
        if one.opname == "LOAD_GLOBAL" and one.argval == "type" and not of_self:
            return True
    return any(_asks_for_type(const) for const in code.co_consts if isinstance(const, CodeType))


def held_proxies(value: Any, depth: int = 0) -> Iterator[fx.Proxy]:
    """The stand-ins of a trace in a value that may be nested."""
    if isinstance(value, fx.Proxy):
        yield value
    elif depth < _DEEPEST:
        for _, part in _parts(value) or ():
            yield from held_proxies(part, depth + 1)


def held_values(value: Any, depth: int = 0) -> Iterator[nn.Module | Tensor]:
    """The modules and tensors in a value: in containers, objects, methods and around functions."""
    if isinstance(value, (nn.Module, Tensor)):
        yield value
        return
    inside = [part for _, part in _parts(value) or ()]
    if isinstance(value, MethodType):
        inside = [value.__self__]
    elif isinstance(value, partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, FunctionType):
        inside = [_contents(cell) for cell in value.__closure__ or ()]
        inside += value.__defaults__ or ()
    for part in inside if depth < _DEEPEST else ():
        yield from held_values(part, depth + 1)


def _methods(module: nn.Module, name: str) -> Iterator[FunctionType]:
    """The functions that `self.name` may mean, those of base classes too (super())."""
    for cls in type(module).__mro__:
        value = vars(cls).get(name)
        for part in (value.fget, value.fset) if isinstance(value, property) else (value,):
            yield from _functions(part)
    yield from _functions(vars(module).get(name))


def _functions(value: Any) -> Iterator[FunctionType]:
    value = getattr(value, "__func__", value) if isinstance(
        value, (MethodType, staticmethod, classmethod)) else value  # fmt: skip
    value = value.func if isinstance(value, partial) else value
    if isinstance(value, FunctionType):
        yield getattr(value, "__wrapped__", value) if isinstance(
            getattr(value, "__wrapped__", value), FunctionType) else value  # fmt: skip
        if hasattr(value, "__wrapped__"):
            yield value


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container or an object of the user's holds; None for what is compared by identity."""
    if isinstance(value, dict):
        return [(key if isinstance(key, _PLAIN) else id(key), part) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, (set, frozenset)):
        return [(id(part), None) for part in value]
    if isinstance(value, (nn.Module, type, ModuleType, FunctionType, MethodType, partial)):
        return None
    if callable(value) or _is_of_torch(type(value).__module__):
        return None
    return list(vars(value).items()) if hasattr(value, "__dict__") else None


def _is_state(value: Any) -> bool:
    return not isinstance(value, (ModuleType, type, FunctionType)) and not callable(value)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that was never given a value
        return None


def _is_of_torch(home: str | None) -> bool:
    return (home or "").split(".")[0] in ("torch", "builtins", "typing", "collections", "math")
