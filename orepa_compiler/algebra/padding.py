"""Padding as an operator, and the layers of torch that do nothing else."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.padding import (
    _CircularPadNd,
    _ConstantPadNd,
    _ReflectionPadNd,
    _ReplicationPadNd,
)

from orepa_compiler.algebra.geometry import Padding
from orepa_compiler.algebra.layers import check_torch_forward, conv_operator, known_width
from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.errors import NotLinear


def padding_operator(like: ConvOperator, padding: Padding, mode: str, value: float) -> ConvOperator:
    """Padding as an operator: one tap of 1 for each channel. like: the identity of such maps.

    padding: of the last axes, (before, after) each; a negative one crops.
    Raises NotLinear where it pads with a number, which is no conv of zero padding.
    """
    if value:
        raise NotLinear(
            f"border: it pads with {value:g}; a conv pads with zeros, or with the bias of the one "
            "before it"
        )
    rank = like.rank
    if not rank:
        raise NotLinear(f"padding of {like.axes} may reach their channels")
    if len(padding) > rank:
        raise NotLinear(f"padding of {len(padding)} axes reaches beyond the {rank} of a map")
    padding = ((0, 0),) * (rank - len(padding)) + padding
    mode = "zeros" if mode == "constant" else mode
    return replace(like, padding=padding, padding_mode=mode)


def padded_with_bias(operator: ConvOperator, padding: ConvOperator) -> ConvOperator:
    """An operator whose output is padded with its own bias.

    pad_b(W x + b) = W pad_0(x) + b

    padding: the operator of padding with zeros. Raises NotLinear where W is not pointwise.
    """
    return (padding @ operator.with_bias(None)).with_bias(operator.bias)


@conv_operator.register(_ConstantPadNd)
@conv_operator.register(_ReflectionPadNd)
@conv_operator.register(_ReplicationPadNd)
@conv_operator.register(_CircularPadNd)
def _(layer: nn.Module, in_channels: int | None = None) -> ConvOperator:
    check_torch_forward(layer)
    flat: tuple[int, ...] = tuple(layer.padding)  # type: ignore[arg-type]
    pairs = list(zip(flat[::2], flat[1::2], strict=True))[::-1]
    like = identity(known_width(in_channels, layer), len(pairs), like=torch.empty(0).double())
    bases = {
        "reflect": _ReflectionPadNd,
        "replicate": _ReplicationPadNd,
        "circular": _CircularPadNd,
    }
    mode = next((name for name, base in bases.items() if isinstance(layer, base)), "constant")
    return padding_operator(like, tuple(pairs), mode, getattr(layer, "value", 0.0))
