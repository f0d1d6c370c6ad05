"""Whether tensors are what they were: what torch counts of a change."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor


class Stamp:
    """Which tensors, where in memory, and after how many edits: what torch counts of a change.

    It does not see an edit through .data or NumPy, or one by a fused optimizer.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._places = [_place(tensor) for tensor in tensors]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        return (
            len(tensors) == len(self._tensors)
            and all(ref() is t for ref, t in zip(self._tensors, tensors, strict=True))
            and [_place(tensor) for tensor in tensors] == self._places
        )


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version
