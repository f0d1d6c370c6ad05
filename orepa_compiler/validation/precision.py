"""Runs a model in float64 where there is room, and says how far rounding may move its outputs."""

from __future__ import annotations

import os

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

# What composing kernels in another order may change in float64, through a whole net.
EXACT = 1e-9

# A rewritten model may be several times as large as the model, and the copy is of it.
_GROWTH = 4


def fits_in_float64(model: nn.Module) -> bool:
    """Whether a float64 copy of what the model may become would fit beside it, on its device."""
    sizes: dict[torch.device, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        sizes[tensor.device] = sizes.get(tensor.device, 0) + tensor.numel() * 8
    return all(size * _GROWTH < _free_bytes(device) for device, size in sizes.items())


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):  # not told on this system
        return float("inf")


def exactly(batches: list[Batch]) -> list[Batch]:
    """The batches with all floating values in float64."""
    made: list[Batch] = map_tensors(
        batches, lambda t: t.detach().double() if t.is_floating_point() else t
    )
    return made


def rounding_limit(model: nn.Module) -> float:
    """How far outputs may be apart before they are looked at closer."""
    dtype = own_dtype(model) or torch.float32
    limit = NOISE_FACTOR * UNMEASURED_NOISE.get(dtype, 4 * torch.finfo(dtype).eps)
    return max(EXACT, min(limit, MAX_TOLERANCE))


def nudged(model: nn.Module) -> nn.Module:
    """A copy in float64 whose weights are moved by half an eps of their own precision, or less."""
    moved = value_copy(model).double()
    eps = torch.finfo(own_dtype(model) or torch.float32).eps
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in moved.parameters():
            part = torch.rand(weight.shape, generator=generator) - 0.5
            weight.mul_(1 + eps * part.to(weight))
    return moved
