"""The model and its batches in float64, as a trial runs them."""

from __future__ import annotations

import torch
from torch import nn

from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.verification.evaluation import Batch, own_dtype
from orepa_compiler.verification.nesting import map_tensors
from orepa_compiler.verification.outputs.rounding import (
    MAX_TOLERANCE,
    NOISE_FACTOR,
    UNMEASURED_NOISE,
)


def exactly(batches: list[Batch]) -> list[Batch]:
    """The batches with all floating values in float64."""
    made: list[Batch] = map_tensors(
        batches, lambda t: t.detach().double() if t.is_floating_point() else t
    )
    return made


def slightly_moved(model: nn.Module) -> nn.Module:
    """The model in float64 with weights that differ by half an eps of its own precision."""
    moved = value_copy(model).double()
    eps = torch.finfo(own_dtype(model) or torch.float32).eps
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in moved.parameters():
            part = torch.rand(weight.shape, generator=generator) - 0.5
            weight.mul_(1 + eps * part.to(weight))
    return moved


def rounding_limit(model: nn.Module) -> float:
    """How far outputs may be apart by rounding in the model's own precision."""
    dtype = own_dtype(model) or torch.float32
    limit = NOISE_FACTOR * UNMEASURED_NOISE.get(dtype, 4 * torch.finfo(dtype).eps)
    return min(limit, MAX_TOLERANCE)
