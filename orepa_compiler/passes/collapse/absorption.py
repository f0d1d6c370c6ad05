"""Norms folded into a conv of any class whose output a kernel scales, by its output channels.

So are a transposed conv, and a conv that pads by the size of its input, which are no operator of
the algebra: f y + b of its output is the output of the same conv with its kernel and bias scaled.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from orepa_compiler.algebra.layers import has_torch_forward, qualified_name

# Known by where the class is defined; their forward is padding and one F.conv2d.
_PADDING_BY_SIZE = {
    "timm.layers.conv2d_same.Conv2dSame",
    "timm.layers.conv2d_same.Conv2dSameExport",
}


def absorbs_norm(conv: nn.Module) -> bool:
    """Whether a norm behind this conv can be folded into its kernel and bias."""
    if isinstance(conv, _ConvTransposeNd):
        return has_torch_forward(conv)
    return qualified_name(conv) in _PADDING_BY_SIZE and "forward" not in vars(conv)


def absorb(conv: nn.Module, factor: Tensor, shift: Tensor) -> nn.Module:
    """The conv followed by y -> factor y + shift, as one conv of its class; both are (C_out,).

    W'_o = f_o W_o,  b'_o = f_o b_o + shift_o
    """
    joined = copy.deepcopy(conv)
    weight, bias = joined.weight, joined.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    factor, shift = (t.to(weight.device, weight.dtype) for t in (factor, shift))
    joined.weight = nn.Parameter(_scaled(joined, weight.detach(), factor), weight.requires_grad)
    scaled = shift if bias is None else shift + factor * bias.detach()
    joined.register_parameter("bias", nn.Parameter(scaled, weight.requires_grad))
    return joined


def _scaled(conv: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """The kernel, scaled by output channel; a transposed one is (C_in, C_out / groups, *K)."""
    ones = (1,) * (weight.dim() - 2)
    if not isinstance(conv, _ConvTransposeNd):
        return weight * factor.reshape(-1, 1, *ones)
    split = weight.reshape(int(conv.groups), -1, *weight.shape[1:])
    return (split * factor.reshape(conv.groups, 1, -1, *ones)).flatten(0, 1)
