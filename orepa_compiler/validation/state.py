"""Puts back what a run of a model changed in it.

The state of a model is what hangs on it and on the objects that it holds: which modules stand
where, flags and counters, lists and dicts, the values of buffers. A forward may change any of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.generation.store import KernelStore

# How many objects, one hanging on the other, are looked into from a module on.
_DEPTH = 4

_LEFT_OUT = (type, ModuleType, KernelStore, torch.jit.ScriptModule)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[ModelState]:
    """The model is after it what it was before, as far as ModelState remembers it."""
    before = ModelState(model)
    try:
        yield before
    finally:
        before.put_back()


class ModelState:
    """What a model is made of, as it was when this was made.

    Values of buffers and of vectors are copied. Larger parameters are not: which tensor they hold
    is remembered, and writes into it are not undone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self._mappings: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._sequences: list[tuple[Any, list[Any]]] = []
        self._cells: list[tuple[CellType, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # an id is another object's once its own is gone
        self._visit(model, 0)

    def put_back(self) -> None:
        """Make the model again what it was."""
        for module, cls in self._classes:
            if type(module) is not cls:
                module.__class__ = cls
        for mapping, before in self._mappings:
            if not _same(mapping, before):
                mapping.clear()
                mapping.update(before)
        for sequence, items in self._sequences:
            if not _same_items(sequence, items):
                sequence.clear()
                (sequence.update if isinstance(sequence, set) else sequence.extend)(items)
        for cell, value in self._cells:
            cell.cell_contents = value
        with torch.no_grad(), torch.inference_mode(False):
            for tensor, held, values in self._tensors:
                if tensor.data_ptr() != held.data_ptr() or tensor.shape != held.shape:
                    tensor.data = held
                if values is not None and not _equal(tensor, values):
                    tensor.detach().copy_(values)

    def is_changed(self) -> bool:
        """Whether anything that is remembered is another by now."""
        return (
            not all(_same(mapping, before) for mapping, before in self._mappings)
            or not all(_same_items(sequence, items) for sequence, items in self._sequences)
            or any(_contents(cell) is not value for cell, value in self._cells)
            or any(
                tensor.data_ptr() != held.data_ptr()
                or (values is not None and not _equal(tensor, values))
                for tensor, held, values in self._tensors
            )
        )

    def _visit(self, value: Any, depth: int) -> None:
        if isinstance(value, _LEFT_OUT) or depth > _DEPTH or id(value) in self._seen:
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
        if isinstance(value, dict):
            self._mappings.append((value, dict(value)))
            return list(value.values())
        if isinstance(value, (list, set, deque)):
            self._sequences.append((value, list(value)))
            return list(value)
        if isinstance(value, (tuple, frozenset)):
            return list(value)
        if isinstance(value, partial):
            return [value.func, *value.args, *value.keywords.values()]
        if isinstance(value, MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, FunctionType):
            return self._remember_cells(value)
        if not hasattr(value, "__dict__"):
            return None
        if isinstance(value, nn.Module):
            self._classes.append((value, type(value)))
        return [vars(value)]

    def _remember_cells(self, function: FunctionType) -> list[Any]:
        held = []
        for cell in function.__closure__ or ():
            try:
                held.append(cell.cell_contents)
            except ValueError:  # a variable that was never given a value
                continue
            self._cells.append((cell, held[-1]))
        return held

    def _remember_tensor(self, tensor: Tensor) -> None:
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_leaf:
            return
        is_large = isinstance(tensor, nn.Parameter) and tensor.dim() > 1
        values = None if is_large else tensor.detach().clone()
        self._tensors.append((tensor, tensor.detach(), values))


def _same(mapping: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return mapping.keys() == before.keys() and all(mapping[k] is v for k, v in before.items())


def _same_items(sequence: Any, items: list[Any]) -> bool:
    return len(sequence) == len(items) and all(a is b for a, b in zip(sequence, items, strict=True))


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _equal(tensor: Tensor, values: Tensor) -> bool:
    return torch.equal(tensor, values) or bool(tensor.isnan().any() and values.isnan().any())
