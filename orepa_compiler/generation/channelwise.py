"""Passes over a kernel by its output channels: scaling, and products with another kernel.

On a CPU they go in parts. What is made on the way then stays in a cache, and in memory that the
process has already: a page that is touched for the first time costs more than the pass over it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# So many numbers at a time: 0.6 MB in float32, 32 output channels of 512 input channels x 9 taps.
PART = 32 * 512 * 9


def channel_parts(kernel: Tensor, numbers: int = 0) -> list[slice]:
    """Slices of the first axis that hold so many numbers each (0: PART); on a GPU one for all."""
    count = kernel.shape[0]
    if kernel.device.type != "cpu" or kernel.numel() <= (numbers or PART):
        return [slice(0, count)]
    step = max(count * (numbers or PART) // kernel.numel(), 1)
    return [slice(start, start + step) for start in range(0, count, step)]


def scaled(kernel: Tensor, factor: Tensor | None, rows: slice = slice(None)) -> Tensor:
    """The rows of a kernel (C_out, ...) behind a scaling layer, (C_out,) or (1,), or none.

    Always a new tensor: a parameter or a gradient that came in is not to be written to.
    """
    if factor is None:
        return kernel[rows].clone()
    return kernel[rows] * _column(factor, kernel, rows)


def scale_(kernel: Tensor, factor: Tensor | None) -> Tensor:
    """The kernel itself, scaled in place."""
    return kernel if factor is None else kernel.mul_(_column(factor, kernel, slice(None)))


def dot(left: Tensor, right: Tensor) -> Tensor:
    """<left, right> for each output channel, (C_out,)."""
    axes = list(range(1, left.dim()))
    found = [(left[rows] * right[rows]).sum(axes) for rows in channel_parts(left)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _column(factor: Tensor, kernel: Tensor, rows: slice) -> Tensor:
    own = factor if factor.shape[0] == 1 else factor[rows]
    return own.reshape(-1, *(1,) * (kernel.dim() - 1))
