"""What a value that may be nested holds: containers, and the attributes of the user's objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (int, float, bool, str, type(None), slice, torch.dtype, torch.device, torch.Size)
_DEPTH = 8


def parts(value: Any) -> list[tuple[Any, Any]]:
    """What a container holds, with its keys; the attributes of an object of the user's."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(enumerate(value))
    if isinstance(value, (Tensor, nn.Module, type, *PLAIN)) or callable(value):
        return []
    return list(vars(value).items()) if hasattr(value, "__dict__") else []


def tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in a value."""
    if isinstance(value, Tensor):
        yield value
    elif depth < _DEPTH:
        for _, part in parts(value):
            yield from tensors(part, depth + 1)
