"""Tells whether there is room for a copy of a model in float64."""

from __future__ import annotations

import os

import torch
from torch import nn

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
