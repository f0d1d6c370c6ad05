"""Holds one output of one batch as every side gave it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orepa_compiler.verification.nesting import kind_name
from orepa_compiler.verification.outputs.decisions import Decision
from orepa_compiler.verification.verdict import Row


@dataclass(frozen=True)
class Comparison:
    """One output of one batch, from every side.

    truth: in float64. noisy: the reference's values in the dtype `working`, once or more; none
    where there is no module to measure noise on. precision: the dtype that was asked for, if any.
    origins: by role, the first module whose output is not finite. decision: what a mask or an index
    was decided on; unclear: where it may be another, if that is not known. noise_name: what the
    noise is of, where it is no dtype's.
    """

    name: str
    batch: int
    reference: Any
    candidate: Any
    truth: Any
    noisy: tuple[Any, ...]
    working: torch.dtype
    precision: torch.dtype | None
    origins: dict[str, str]
    factor: float
    decision: Decision | None = None
    unclear: Tensor | None = None
    noise_name: str = ""

    @property
    def noise_of(self) -> str:
        """What the noise is of, in words: a dtype, or what it was made for."""
        return self.noise_name or short(self.working)

    def row(
        self,
        reason: str,
        *,
        error: float | None = None,
        noise: float | None = None,
        tolerance: float | None = None,
        top1: float | None = None,
    ) -> Row:
        is_tensor = isinstance(self.reference, Tensor)
        shape = tuple(self.reference.shape) if is_tensor else ()
        dtype = short(self.reference.dtype) if is_tensor else kind_name(self.reference)
        return Row(self.name, self.batch, shape, dtype, error, noise, tolerance, top1, reason)


def short(dtype: torch.dtype) -> str:
    """float32, for torch.float32."""
    return str(dtype).removeprefix("torch.")


def magnitude_of(truth: Tensor) -> float:
    """What errors are relative to: the largest value of the truth; 1 where that is 0."""
    return float(truth.abs().max()) or 1.0


def wide(values: Tensor) -> Tensor:
    """The values in the finest type of their kind."""
    return values.to(torch.complex128 if values.is_complex() else torch.float64)
