"""Squeezes the depthwise - pointwise branch: a small product for each input channel.

    W[o, i, k] = sum_j p[o, i, j] d[i, j, k]

j counts the channels that the depthwise layer makes of one input channel. A CPU's batched product
is fast only where its result is contiguous, and where that has many columns: so the output
channels are the columns, and they go in parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orepa_compiler.generation.channelwise import channel_parts


def add_separable(total: Tensor, depthwise: Tensor, pointwise: Tensor, factor: Tensor) -> None:
    """total + v W, in place.

    total: (groups, C_out / groups, C_in / groups, k). depthwise: (C_in, j, k). pointwise: (groups,
    C_out / groups, C_in / groups, j). factor: v, (groups, C_out / groups, 1, 1).
    """
    groups, width = pointwise.shape[0], pointwise.shape[2]
    for rows in channel_parts(pointwise.transpose(0, 1)):
        own = _by_channel(pointwise[:, rows])
        made = torch.bmm(depthwise.transpose(1, 2), own)
        made = made.unflatten(0, (groups, width)).permute(0, 3, 1, 2)
        total[:, rows].addcmul_(made, factor[:, rows])


def separable_gradients(
    grad: Tensor, depthwise: Tensor, pointwise: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of factor, depthwise and pointwise, each in its shape, from that of v W.

    q[o, i, j] = sum_k G d:  dp = v q,  dv = <p, q>,  dd[i, j, k] = sum_o v p G.
    """
    groups, width = pointwise.shape[0], pointwise.shape[2]
    of_depthwise, of_pointwise = torch.zeros_like(depthwise), torch.empty_like(pointwise)
    of_factor = torch.empty_like(factor)
    for rows in channel_parts(pointwise.transpose(0, 1)):
        own, of_own = pointwise[:, rows], of_pointwise[:, rows]
        part = grad[:, rows].clone(memory_format=torch.contiguous_format)
        made = torch.bmm(depthwise, _by_channel(part))
        of_own.copy_(made.unflatten(0, (groups, width)).permute(0, 3, 1, 2))
        of_factor[:, rows] = (own * of_own).sum((2, 3), keepdim=True)
        of_own.mul_(factor[:, rows])
        part.mul_(factor[:, rows])
        of_depthwise.baddbmm_(_by_channel(own), _by_channel(part).transpose(1, 2))
    return of_factor, of_depthwise, of_pointwise


def _by_channel(kernel: Tensor) -> Tensor:
    """(groups, o, i, j) as a matrix for each input channel, (C_in, j, o)."""
    return kernel.permute(0, 2, 3, 1).flatten(0, 1)
