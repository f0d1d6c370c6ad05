"""Remembers what a call changed in modules, to put it back: attributes, registrations, values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_ABSENT = object()

# The dictionaries of a module in which tensors and children are registered.
_REGISTRIES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Snapshot:
    """Modules as they were: every attribute, what is registered, and the values of tensors.

    spaces: each dictionary with a copy of it. values: each tensor with a copy of it.
    """

    spaces: list[tuple[MutableMapping[str, Any], dict[str, Any]]] = field(default_factory=list)
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, modules: list[nn.Module], *, with_parameters: bool = True) -> Snapshot:
        """The snapshot of these modules, of their parameters' values only where asked for."""
        snapshot, seen = cls(), set()
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # its attributes lie in C++
            for space in _spaces(module):
                snapshot.spaces.append((space, dict(space)))
                for value in space.values():
                    is_wanted = with_parameters or not isinstance(value, nn.Parameter)
                    if is_wanted and _has_values(value) and id(value) not in seen:
                        seen.add(id(value))
                        snapshot.values.append((value, value.detach().clone()))
        return snapshot

    def changes(self) -> list[Callable[[], None]]:
        """What puts back each thing that differs by now; the modes of modules are left out."""
        undo: list[Callable[[], None]] = []
        for space, before in self.spaces:
            changed = {
                k for k in {*before, *space} if space.get(k, _ABSENT) is not before.get(k, _ABSENT)
            }
            changed -= {"training"}
            if changed:
                undo.append(_put_back(space, {k: before.get(k, _ABSENT) for k in changed}))
        for tensor, kept in self.values:
            if tensor.shape != kept.shape or not torch.equal(tensor.detach(), kept):
                undo.append(_write_back(tensor, kept))
        return undo


def _spaces(module: nn.Module) -> Iterator[MutableMapping[str, Any]]:
    own = vars(module)
    yield own
    yield from (own[name] for name in _REGISTRIES)


def _has_values(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_lazy(value) and not value.is_meta


def _put_back(space: MutableMapping[str, Any], entries: dict[str, Any]) -> Callable[[], None]:
    def undo() -> None:
        for key, value in entries.items():
            if value is _ABSENT:
                space.pop(key, None)
            else:
                space[key] = value

    return undo


def _write_back(tensor: Tensor, before: Tensor) -> Callable[[], None]:
    def undo() -> None:
        # Through .data: a parameter's in-place write would need no_grad, an inference tensor more.
        tensor.data = before if tensor.shape != before.shape else tensor.data.copy_(before)

    return undo
