"""Describes a conv in a few words, as the plan shows it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.layers import per_axis


def describe_conv(module: nn.Module) -> str:
    """A conv in a few words: Conv2d 64 -> 128 3x3 /2."""
    if not isinstance(module, _ConvNd):
        return type(module).__name__
    rank = len(module.kernel_size)
    stride, dilation = per_axis(module.stride, rank), per_axis(module.dilation, rank)
    parts = [f"{type(module).__name__} {module.in_channels} -> {module.out_channels}"]
    parts.append("x".join(map(str, module.kernel_size)))
    if set(stride) != {1}:
        parts.append("/" + "x".join(map(str, dict.fromkeys(stride))))
    if module.groups > 1:
        parts.append(f"groups {module.groups}")
    if set(dilation) != {1}:
        parts.append("dilation " + "x".join(map(str, dict.fromkeys(dilation))))
    return " ".join(parts)
