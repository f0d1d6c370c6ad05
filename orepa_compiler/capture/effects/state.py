"""The state of Python that a forward may read or change: attributes, globals, variables around it.

A graph holds none of it. Where a forward changes something that some forward reads, the next call
may go another way than the one that was traced.
"""

from __future__ import annotations

from collections import UserDict, UserList, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

from orepa_compiler.capture.positions import is_hidden, position_of
from orepa_compiler.capture.tracing.bytecode import (
    cell_contents,
    defaults_of,
    is_of_torch,
    names_in,
)
from orepa_compiler.containers import attributes, items

OWN = ("_parameters", "_buffers", "_modules")
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
MADE_BY_TRACE = "_tensor_constant"
# By these an attribute is set without nn.Module being told.
_BEHIND_MODULES = {"__dict__", "vars", "__setattr__"}
_DEEPEST, _MOST_FACTS = 4, 2000


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
        if name not in OWN and not name.startswith(MADE_BY_TRACE):
            seen.add(f"its {name}", value)
    if any(_BEHIND_MODULES & names_in(function.__code__) for function in functions):
        for path, child in module.named_modules():
            for name, value in vars(child).items() if path else ():
                if name not in OWN and isinstance(value, _PLAIN):
                    seen.add(f"{name} of its {path}", value)
    for cls in type(module).__mro__:
        if not is_of_torch(cls.__module__) and cls is not object:
            for name, value in variables_of(cls):
                seen.add(f"{name} of its class", value, (id(cls), name))
    for function in functions:
        _add_own_state(seen, function)
        around = function.__globals__
        for name in names_in(function.__code__):
            if name in around and is_state(value := around[name]):
                seen.add(f"the global {name}", value, (id(around), name))
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            if name != "__class__" and is_state(value := cell_contents(cell)):
                seen.add(f"{name}, a variable around its forward", value, id(cell))
    return seen


def _add_own_state(seen: Visible, function: FunctionType) -> None:
    """What a function keeps from call to call: defaults that can change, and its attributes."""
    for name, value in defaults_of(function).items():
        if not isinstance(value, _PLAIN):
            seen.add(f"{name}, a default of {function.__name__}", value)
    if vars(function):
        seen.add(f"an attribute of {function.__name__}", vars(function), id(vars(function)))


def _fact(value: Any, held: set[Hashable], depth: int) -> Any:
    """Something to compare in place of a value; what holds its parts is added to `held`."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        held.add(id(value))
        return id(value), 0 if value.is_inference() else value._version
    parts = _parts(value)
    if depth == _DEEPEST or len(held) > _MOST_FACTS:
        return id(value)
    if parts is None:
        return id(value), position_of(value)
    held.add(id(value))
    return id(value), tuple((key, _fact(part, held, depth + 1)) for key, part in parts)


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
        inside = [cell_contents(cell) for cell in value.__closure__ or ()]
        inside += value.__defaults__ or ()
    for part in inside if depth < _DEEPEST else ():
        yield from held_values(part, depth + 1)


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container or an object of the user's holds; None for what is compared by identity."""
    if (held := items(value)) is not None:
        return [(key if isinstance(key, _PLAIN) else id(key), part) for key, part in held]
    if isinstance(value, (UserDict, UserList)):
        return _parts(value.data)
    if isinstance(value, (set, frozenset)):
        return [(id(part), part) for part in value]
    if isinstance(value, (nn.Module, type, ModuleType, FunctionType, MethodType, partial)):
        return None
    if is_of_torch(type(value).__module__) or is_hidden(value):
        return None
    return attributes(value)


def variables_of(cls: type) -> list[tuple[str, Any]]:
    """The attributes of a class that hold values, and are no methods or the like."""
    kinds = (*_PLAIN, list, dict, set, deque)
    return [(name, value) for name, value in vars(cls).items()
            if isinstance(value, kinds) and not name.startswith("__")]  # fmt: skip


def is_state(value: Any) -> bool:
    """Whether what a name stands for is a value, and no code."""
    return not isinstance(value, (ModuleType, type, FunctionType)) and not callable(value)
