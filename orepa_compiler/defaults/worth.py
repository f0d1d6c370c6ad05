"""Judges whether a block would pay in the place of a conv; `where=` overrules it."""

from __future__ import annotations

from math import prod

from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.layers import per_axis
from orepa_compiler.capture import Capture
from orepa_compiler.defaults.following import ACTIVATION, NORM, NOTHING, reads_pooled


def left_alone_reason(capture: Capture, path: str, conv: _ConvNd, follows: str) -> str | None:
    """Why a block would not pay or not train here; where= overrides it."""
    ask = "; ask for it with where="
    if reads_pooled(capture, path):
        return "on maps pooled to one pixel its kernel costs more to make than to apply" + ask
    size = conv.kernel_size
    if size == per_axis(conv.stride, len(size)) and prod(size) > 1:
        what = "an upsampling without overlap" if conv.transposed else "a patch embedding"
        return f"{what} (kernel = stride)" + ask
    if follows in (NORM, ACTIVATION):
        return None
    if follows == NOTHING and (reason := capture.unknown_calls(path)):
        return f"what follows it is not known: {reason}" + ask
    return f"no norm follows: {follows}" + ask
