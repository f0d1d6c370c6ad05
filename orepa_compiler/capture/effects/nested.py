"""Finds what a value that may be nested holds: in containers, and in objects of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.containers import attributes, members, shown

PLAIN = (int, float, bool, str, type(None), slice, torch.dtype, torch.device, torch.Size)
_LEAVES = (Tensor, nn.Module, type, *PLAIN)
_DEPTH = 8


def parts(value: Any) -> list[tuple[Any, Any]]:
    """Gives what a container holds, with its keys; the attributes of an object of the user's."""
    held = shown(value)
    if held is None and isinstance(value, (set, frozenset)):
        held = list(enumerate(members(value) or ()))
    if held is not None:
        return held
    if isinstance(value, _LEAVES) or callable(value):
        return []
    return attributes(value) or []


def tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Finds the tensors in a value."""
    if isinstance(value, Tensor):
        yield value
    elif depth < _DEPTH:
        for _, part in parts(value):
            yield from tensors(part, depth + 1)
