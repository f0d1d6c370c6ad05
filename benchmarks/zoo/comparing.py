"""How far two lists of outputs are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from orepa_compiler.verification.nesting import is_finite


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """max |found - expected| / max |expected|, the largest of all outputs; inf for another form."""
    if not expected or len(found) != len(expected):
        return float("inf")
    return max(map(_tensor_error, found, expected))


def _tensor_error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not is_finite([found, expected]):
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    distance, size = (
        float(t.abs().max()) if t.numel() else 0.0 for t in (found - expected, expected)
    )
    return distance / size if size else (0.0 if not distance else float("inf"))
