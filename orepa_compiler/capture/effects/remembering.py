"""The state of Python, remembered before something runs and put back after it.

What hangs on a value: the attributes of modules and objects, what stands in lists and dicts, the
variables around functions and their defaults, how far an iterator is, the values of buffers.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.capture.effects.state import is_state, variables_of
from orepa_compiler.capture.positions import is_hidden, is_iterator, position_of, puts_back
from orepa_compiler.capture.tracing.bytecode import (
    cell_contents,
    functions_of,
    is_of_torch,
    names_in,
)
from orepa_compiler.containers import members, slots_of

# How many objects, one hanging on the other, are looked into from a module on.
_DEPTH = 4

_LEFT_OUT = (type, ModuleType, torch.jit.ScriptModule)
_OF_THE_SYSTEM = ("logging", "threading", "weakref", "re", "os", "sys", "warnings", "functools")


@contextmanager
def code_kept(model: nn.Module) -> Iterator[None]:
    """What the code of a model keeps outside of it is after it what it was before."""
    before = Remembered()
    before.remember_code(model.modules())
    try:
        yield
    finally:
        before.put_back()


class Remembered:
    """Values as they were when this was made.

    Buffers and vectors are copied. Larger parameters are not: which tensor they hold is remembered,
    and writes into it are not undone. left_out: types of objects that are not looked into.
    """

    def __init__(self, *roots: Any, left_out: tuple[type, ...] = ()) -> None:
        self._left_out = (*_LEFT_OUT, *left_out)
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self._mappings: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._sequences: list[tuple[Any, list[Any]]] = []
        self._attributes: list[tuple[Any, str, Any]] = []
        self._items: list[tuple[dict[Any, Any], Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []
        self._positions: list[tuple[Any, Any, Callable[[], None] | None]] = []
        self._fresh: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # an id is another object's once its own is gone
        for root in roots:
            self._visit(root, 0)

    def remember_code(self, modules: Iterable[nn.Module]) -> None:
        """Also what the code of their forwards keeps outside of them.

        Defaults and attributes of functions, attributes of classes, global variables.
        """
        for module in {type(module): module for module in modules}.values():
            for cls in type(module).__mro__:
                if not is_of_torch(cls.__module__) and cls is not object:
                    for name, value in variables_of(cls):
                        self._attributes.append((cls, name, value))
                        self._visit(value, 1)
            for function in functions_of(module):
                self._visit(function, 0)
                around = function.__globals__
                for name in names_in(function.__code__):
                    if name in around and is_state(value := around[name]):
                        self._items.append((around, name, value))
                        self._visit(value, 1)

    def put_back(self) -> None:
        """Makes all of it again what it was."""
        for module, cls in self._classes:
            if type(module) is not cls:
                module.__class__ = cls
        moved = {id(value) for value, was, _ in self._positions if position_of(value) != was}
        for value, _, put in self._positions:
            if put is not None and id(value) in moved:
                put()
        fresh = {key: copy.copy(value) for key, value in self._fresh.items() if key in moved}
        for mapping, before in self._mappings:
            before = {key: fresh.get(id(value), value) for key, value in before.items()}
            if not _same(mapping, before):
                mapping.clear()
                mapping.update(before)
        for sequence, items in self._sequences:
            items = [fresh.get(id(value), value) for value in items]
            if not _same_items(sequence, items):
                sequence.clear()
                (sequence.update if isinstance(sequence, set) else sequence.extend)(items)
        for holder, name, value in self._attributes:
            if _attribute(holder, name) is not (value := fresh.get(id(value), value)):
                setattr(holder, name, value)
        for around, name, value in self._items:
            if around.get(name) is not (value := fresh.get(id(value), value)):
                around[name] = value
        self._put_back_tensors()

    def _put_back_tensors(self) -> None:
        with torch.no_grad(), torch.inference_mode(False):
            for tensor, held, values, is_trained in self._tensors:
                if tensor.data_ptr() != held.data_ptr() or tensor.shape != held.shape:
                    tensor.data = held
                if values is not None and not _equal(tensor, values):
                    tensor.detach().copy_(values)
                if tensor.is_leaf and tensor.requires_grad != is_trained:
                    tensor.requires_grad_(is_trained)

    def is_changed(self) -> bool:
        """Whether anything that is remembered is another by now."""
        return (
            not all(_same(mapping, before) for mapping, before in self._mappings)
            or not all(_same_items(sequence, items) for sequence, items in self._sequences)
            or any(_attribute(holder, name) is not v for holder, name, v in self._attributes)
            or any(around.get(name) is not value for around, name, value in self._items)
            or any(position_of(value) != position for value, position, _ in self._positions)
            or any(
                tensor.data_ptr() != held.data_ptr()
                or (values is not None and not _equal(tensor, values))
                for tensor, held, values, _ in self._tensors
            )
        )

    def _visit(self, value: Any, depth: int) -> None:
        if isinstance(value, self._left_out) or depth > _DEPTH or id(value) in self._seen:
            return
        inside = self._remember(value)
        if inside is None:
            return
        self._seen.add(id(value))
        self._alive.append(value)
        for part in inside:
            self._visit(part, 0 if isinstance(part, nn.Module) else depth + 1)

    def _remember(self, value: Any) -> list[Any] | None:
        """What hangs on a value, which is remembered; None for one that cannot change."""
        if isinstance(value, Tensor):
            self._remember_tensor(value)
            return []
        if (held := members(value)) is not None:
            if isinstance(value, dict):
                self._mappings.append((value, dict(value)))
            elif isinstance(value, (list, set, deque)):
                self._sequences.append((value, held))
            return held
        if isinstance(value, partial):
            return [value.func, *value.args, *value.keywords.values()]
        if isinstance(value, MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, FunctionType):
            return self._remember_function(value)
        return self._remember_object(value)

    def _remember_object(self, value: Any) -> list[Any] | None:
        if isinstance(value, nn.Module):
            self._classes.append((value, type(value)))
            return [vars(value)]
        if is_hidden(value):
            return self._remember_position(value)
        if type(value).__module__.partition(".")[0] in _OF_THE_SYSTEM:
            return None
        slots = [name for cls in type(value).__mro__ for name in slots_of(cls)]
        held = [(value, name, getattr(value, name)) for name in slots if hasattr(value, name)]
        if hasattr(value, "__dict__"):
            self._attributes += held
            return [vars(value), *(part for _, _, part in held)]
        if held:
            self._attributes += held
            return [part for _, _, part in held]
        return self._remember_position(value)

    def _remember_position(self, value: Any) -> list[Any] | None:
        """An iterator, an array or a generator of numbers: its state is in no attribute."""
        position = position_of(value)
        if position is None:
            return None
        self._positions.append((value, position, puts_back(value)))
        if is_iterator(value):
            self._fresh[id(value)] = copy.copy(value)
        return []

    def _remember_function(self, function: FunctionType) -> list[Any]:
        held: list[Any] = []
        for cell in function.__closure__ or ():
            if _is_set(cell):
                held.append(cell.cell_contents)
                self._attributes.append((cell, "cell_contents", held[-1]))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            held.append(value)
        self._mappings.append((vars(function), dict(vars(function))))
        return held + list(vars(function).values())

    def _remember_tensor(self, tensor: Tensor) -> None:
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_leaf:
            return
        is_large = isinstance(tensor, nn.Parameter) and tensor.dim() > 1
        values = None if is_large else tensor.detach().clone()
        self._tensors.append((tensor, tensor.detach(), values, tensor.requires_grad))


def _attribute(holder: Any, name: str) -> Any:
    if isinstance(holder, CellType):
        return cell_contents(holder)
    return vars(holder).get(name) if isinstance(holder, type) else getattr(holder, name, None)


def _is_set(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that was never given a value
        return False


def _same(mapping: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return mapping.keys() == before.keys() and all(mapping[k] is v for k, v in before.items())


def _same_items(sequence: Any, items: list[Any]) -> bool:
    return len(sequence) == len(items) and all(a is b for a, b in zip(sequence, items, strict=True))


def _equal(tensor: Tensor, values: Tensor) -> bool:
    return torch.equal(tensor, values) or bool(tensor.isnan().any() and values.isnan().any())
