"""Kernels as tensors on a lattice of taps: spread them, place them, convolve them.

A kernel is (C_out, C_in / groups, *size). Nothing here looks at a value, and all of it
is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def place(weight: Tensor, *, counts: list[int], offsets: list[int], spacings: list[int]) -> Tensor:
    """The kernel's taps on a larger lattice, zeros elsewhere."""
    weight = spread(weight, spacings)
    pads: list[int] = []
    for axis in reversed(range(len(counts))):
        size = weight.shape[2 + axis]
        pads += [offsets[axis], counts[axis] - offsets[axis] - size]
    return F.pad(weight, pads) if any(pads) else weight


def spread(weight: Tensor, spacings: Sequence[int]) -> Tensor:
    """Zeros between the taps, so that they lie `spacing` apart."""
    for axis, spacing in enumerate(spacings):
        size = weight.shape[2 + axis]
        if spacing == 1 or size == 1:
            continue
        weight = weight.movedim(2 + axis, -1)
        weight = F.pad(weight.unsqueeze(-1), (0, spacing - 1)).flatten(-2)
        weight = weight[..., : (size - 1) * spacing + 1].movedim(-1, 2 + axis)
    return weight


def convolve(outer: Tensor, inner: Tensor) -> Tensor:
    """True convolution of kernels, block by block.

    outer: (blocks, o, t, *k2), inner: (blocks, t, i, *k1), result: (blocks, o, i, *(k1 + k2 - 1)).
    """
    blocks, out, middle = outer.shape[:3]
    k2, k1 = outer.shape[3:], inner.shape[3:]
    if outer.is_meta:
        sizes = (a + b - 1 for a, b in zip(k2, k1, strict=True))
        return outer.new_empty(blocks, out, inner.shape[2], *sizes)
    if prod(k1) == 1:
        full = torch.einsum("botk,bti->boik", outer.flatten(3) if k2 else outer[..., None],
                            inner.flatten(2).reshape(blocks, middle, -1))  # fmt: skip
        return full.reshape(blocks, out, -1, *k2)
    if prod(k2) == 1:
        full = torch.einsum("bot,btik->boik", outer.reshape(blocks, out, middle), inner.flatten(3))
        return full.reshape(blocks, out, -1, *k1)
    # F.conv is a cross-correlation: one kernel is flipped to make it a convolution.
    axes = tuple(range(3, outer.dim()))
    weight = outer.flip(axes).reshape(blocks * out, middle, *k2)
    signal = inner.movedim(2, 0).reshape(-1, blocks * middle, *k1)
    padding = [k - 1 for k in k2]
    full = CONV[len(k2)](signal, weight, None, 1, padding, 1, blocks)
    return full.reshape(full.shape[0], blocks, out, *full.shape[2:]).movedim(0, 2)


def pad(x: Tensor, padding: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """x padded in the given mode; negative padding crops, after the rest was padded."""
    grow = [max(p, 0) for pair in reversed(padding) for p in pair]
    crop = [min(p, 0) for pair in reversed(padding) for p in pair]
    if any(grow):
        x = F.pad(x, grow, mode="constant" if mode == "zeros" else mode)
    return F.pad(x, crop) if any(crop) else x
