"""Contracts two kernels over the channels between them, which is where the arithmetic is.

    R[o, i, k] = sum_t K[o, t, k] D[t, i]        within each group

K: (C_out, T / groups, k), in any memory layout, D: (T, C_in / groups). The gradients are the same
contraction again, so three products make a training step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orepa_compiler.generation.channelwise import PART, channel_parts, scaled

# As many images as a 1 x 1 conv needs to run in oneDNN, and so many products to be worth it.
_IMAGES = 16
_MANY_PRODUCTS = 10**7
# Numbers of the scaled kernel that give a part of D's gradient at a time.
_PART = 4 * PART


def contract(outer: Tensor, inner: Tensor, groups: int) -> Tensor:
    """R = K D, (C_out, C_in / groups, k)."""
    if groups > 1:
        split = torch.einsum("gotk,gti->goik", _by_group(outer, groups), _by_group(inner, groups))
        made = split.flatten(0, 1)
    elif _runs_as_conv(outer, inner):
        return _from_image(torch.conv2d(_image(outer), _pointwise(inner.t())), outer)
    else:
        made = _from_matrix(_matrix(outer) @ inner, outer)
    return made if is_taps_major(outer) else made.contiguous()


def gradient_of_outer(grad: Tensor, inner: Tensor, groups: int) -> Tensor:
    """H = G D^T, (C_out, T / groups, k), from the gradient G of R."""
    if groups > 1:
        split = torch.einsum("goik,gti->gotk", _by_group(grad, groups), _by_group(inner, groups))
        return split.flatten(0, 1)
    if _runs_as_conv(grad, inner):
        return _from_image(torch.conv2d(_image(grad), _pointwise(inner)), grad)
    return _from_matrix(_matrix(grad) @ inner.t(), grad)


def gradient_of_inner(grad: Tensor, outer: Tensor, factor: Tensor | None, groups: int) -> Tensor:
    """dD = sum_{o, k} v K G, (T, C_in / groups), from the gradient G of v R; factor: v."""
    if groups > 1:
        own = _by_group(scaled(outer, factor), groups)
        return torch.einsum("gotk,goik->gti", own, _by_group(grad, groups)).flatten(0, 1)
    total = grad.new_zeros(outer.shape[1], grad.shape[1])
    # in parts, so that the scaled kernel is never there as a whole
    for rows in channel_parts(outer, _PART):
        total.addmm_(_matrix(scaled(outer, factor, rows)).t(), _matrix(grad[rows]))
    return total


def is_taps_major(kernel: Tensor) -> bool:
    """Whether (o, i, k) lies in memory as (o, k, i), as it does in channels_last."""
    return kernel.stride(1) < kernel.stride(2) or kernel.shape[2] == 1


def _runs_as_conv(kernel: Tensor, inner: Tensor) -> bool:
    """Whether a 1 x 1 conv is the faster way: a CPU's is, by 10 to 25 %, and in both layouts.

    Not so on a GPU, where convolutions may round to TF32 and matrix products do not.
    """
    rows, _, taps = kernel.shape
    return (
        kernel.device.type == "cpu"
        and kernel.dtype == torch.float32
        and taps > 1
        and rows % _IMAGES == 0
        and rows * taps * inner.numel() >= _MANY_PRODUCTS
    )


def _matrix(kernel: Tensor) -> Tensor:
    """(o, t, k) as rows of channels, (o k, t)."""
    return kernel.transpose(1, 2).reshape(-1, kernel.shape[1])


def _from_matrix(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(like.shape[0], like.shape[2], -1).transpose(1, 2)


def _image(kernel: Tensor) -> Tensor:
    """The kernel as feature maps: (o, t, 1, k), or few of many pixels, (16, t, 1, o k / 16)."""
    if not is_taps_major(kernel):
        return kernel.unsqueeze(2)
    return _matrix(kernel).reshape(_IMAGES, 1, -1, kernel.shape[1]).permute(0, 3, 1, 2)


def _from_image(image: Tensor, like: Tensor) -> Tensor:
    if not is_taps_major(like):
        return image.squeeze(2)
    return _from_matrix(image.permute(0, 2, 3, 1), like)


def _pointwise(matrix: Tensor) -> Tensor:
    return matrix.contiguous()[:, :, None, None]


def _by_group(kernel: Tensor, groups: int) -> Tensor:
    return kernel.reshape(groups, -1, *kernel.shape[1:])
