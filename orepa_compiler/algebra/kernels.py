"""Spreads, places, convolves, regroups and composes kernels: tensors on a lattice of taps.

A kernel is (C_out, C_in / groups, *size). Nothing here looks at a value, and all of it
is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from orepa_compiler.algebra.geometry import Geometry

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


def regroup(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """A kernel of so many groups written with fewer: block-diagonal, filled with zeros."""
    if fewer == groups:
        return weight
    assert groups % fewer == 0
    blocks, kernel = groups // fewer, weight.shape[2:]
    out, width = weight.shape[0] // groups, weight.shape[1]
    split = weight.reshape(fewer, blocks, out, 1, width, *kernel)
    eye = torch.eye(blocks, dtype=torch.bool, device=weight.device)
    eye = eye.reshape(1, blocks, 1, blocks, 1, *(1,) * len(kernel))
    # where, not a product: 0 * inf would spread a broken weight over its whole group
    full = torch.where(eye, split, torch.zeros((), dtype=split.dtype, device=split.device))
    return full.reshape(weight.shape[0], blocks * width, *kernel)


def compose_kernels(
    second: Tensor, outer: Geometry, first: Tensor, inner: Geometry
) -> tuple[Tensor, int, tuple[int, ...]]:
    """The kernel of one conv after another, with its groups and dilation.

    second, outer: the kernel and the geometry of the later one; first, inner: of the one before.
    """
    groups, outer_groups = gcd(outer.groups, inner.groups), outer.groups
    if outer.groups > groups and inner.groups > groups:
        second, outer_groups = regroup(second, outer.groups, groups), groups
    dilation, inner_spacings, outer_spacings = [], [], []
    for axis in range(outer.rank):
        near = inner.dilation[axis] if inner.kernel_size[axis] > 1 else 0
        far = inner.stride[axis] * outer.dilation[axis] if outer.kernel_size[axis] > 1 else 0
        step = gcd(near, far) or 1
        dilation.append(step)
        inner_spacings.append(max(near // step, 1))
        outer_spacings.append(max(far // step, 1))
    second_kernel = spread(second, outer_spacings)
    first_kernel = spread(first, inner_spacings)
    # Where one side has the finer groups, its blocks are composed one by one and never densified.
    pieces = max(outer_groups, inner.groups) // groups
    middle = inner.out_channels // (groups * pieces)
    k2, k1 = second_kernel.shape[2:], first_kernel.shape[2:]
    if inner.groups > groups:
        second_kernel = second_kernel.reshape(groups, -1, pieces, middle, *k2).transpose(1, 2)
    second_kernel = second_kernel.reshape(groups * pieces, -1, middle, *k2)
    first_kernel = first_kernel.reshape(groups * pieces, middle, -1, *k1)
    full = convolve(second_kernel, first_kernel)
    if inner.groups > groups:
        full = full.reshape(groups, pieces, *full.shape[1:]).transpose(1, 2)
    kernel = full.shape[-outer.rank :] if outer.rank else ()
    weight = full.reshape(outer.out_channels, inner.in_channels // groups, *kernel)
    return weight, groups, tuple(dilation)


def compose_biases(
    second: Tensor, groups: int, bias: Tensor | None, inner_bias: Tensor | None
) -> Tensor | None:
    """b_2 + sum_taps W_2 b_1. second, groups, bias: of the later conv."""
    if inner_bias is None:
        return bias
    if inner_bias.is_meta:
        return inner_bias.new_empty(second.shape[0])
    taps = second.flatten(2).sum(2) if second.dim() > 2 else second
    taps = taps.reshape(groups, -1, taps.shape[1])
    carried = torch.einsum("got,gt->go", taps, inner_bias.reshape(groups, -1)).flatten()
    return sum_biases(bias, carried)


def sum_biases(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def pad(x: Tensor, padding: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """x padded in the given mode; negative padding crops, after the rest was padded."""
    grow = [max(p, 0) for pair in reversed(padding) for p in pair]
    crop = [min(p, 0) for pair in reversed(padding) for p in pair]
    if any(grow):
        x = F.pad(x, grow, mode="constant" if mode == "zeros" else mode)
    return F.pad(x, crop) if any(crop) else x
