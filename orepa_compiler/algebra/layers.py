"""Reads a layer as an operator; conv_operator is where anyone adds a layer.

A handler speaks only for the exact forward it was written for. A subclass with another forward (a
weight-standardized conv, say) is refused by name and never read as if it were its base class.
"""

from __future__ import annotations

from functools import singledispatch
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from orepa_compiler.algebra.classifiers import (
    FROZEN_NORMS,
    NORMS_WITH_ACTIVATION,
    norm_axes,
    own_forward_reason,
    qualified_name,
)
from orepa_compiler.algebra.geometry import Padding
from orepa_compiler.algebra.maps import ANYTHING, Axes
from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.algebra.overriding import overriding_reason
from orepa_compiler.errors import NotLinear


@singledispatch
def conv_operator(layer: nn.Module, in_channels: int | None = None) -> ConvOperator:
    """Says which convolution a layer computes in eval mode.

        operator = conv_operator(nn.Conv2d(3, 8, 3)) + conv_operator(nn.Conv2d(3, 8, 3))

    in_channels: the width of the input, for layers that do not know it (identity, average pooling).
    Add a layer with `@conv_operator.register(MyLayer)`.
    Raises NotLinear where the layer is not one convolution, or is not known.
    """
    name = qualified_name(layer)
    if name in FROZEN_NORMS:
        return _norm_operator(layer)
    if name in NORMS_WITH_ACTIVATION:
        operator, rest = linear_part(layer)
        if rest is None:
            return operator
        raise NotLinear(f"{type(layer).__name__} is followed by its activation {rest}")
    if isinstance(layer, _ConvTransposeNd):
        raise NotLinear(
            f"{type(layer).__name__} is a transposed conv, and no conv of what it reads: it stays, "
            "and a norm behind it goes into its kernel"
        )
    raise NotLinear(
        f"{type(layer).__name__} is not a known linear layer; if it is one, add it with "
        f"conv_operator.register({type(layer).__name__})"
    )


def has_handler(layer: nn.Module) -> bool:
    """Whether conv_operator was told of layers of this type, or of a base of it."""
    return conv_operator.dispatch(type(layer)) is not conv_operator.dispatch(object)


def linear_part(
    layer: nn.Module, in_channels: int | None = None
) -> tuple[ConvOperator, nn.Module | None]:
    """A layer as (operator, what is left to do after it); None where nothing is left.

    A norm with an activation inside is linear and then not: its norm can be folded, its activation
    stays. Raises NotLinear as conv_operator does.
    """
    if qualified_name(layer) not in NORMS_WITH_ACTIVATION:
        return conv_operator(layer, in_channels), None
    operator = _norm_operator(layer)
    parts = [getattr(layer, name, None) for name in ("drop", "act")]
    rest = [part for part in parts if part is not None and not isinstance(part, nn.Identity)]
    if not rest:
        return operator, None
    return operator, rest[0] if len(rest) == 1 else nn.Sequential(*rest)


def kernel_operator(conv: _ConvNd) -> ConvOperator:
    """The conv's kernel with its geometry, whatever its forward does with it.

    That of a transposed conv, (C_in, C_out / groups, *K), is the kernel of the conv that it is the
    adjoint of.
    """
    rank = conv.weight.dim() - 2
    return ConvOperator(
        conv.weight,
        None if conv.transposed else conv.bias,
        per_axis(conv.stride, rank),
        conv_padding(conv),
        per_axis(conv.dilation, rank),
        conv.groups,
        conv.padding_mode,
    )


def conv_padding(conv: _ConvNd) -> Padding:
    """The conv's padding as (before, after) per axis; strings spelled out as torch does it.

    With another mode than zeros torch pads by what it was told when the conv was made.
    """
    if conv.padding_mode == "zeros" or conv.transposed:
        return _told_padding(conv)
    flat = conv._reversed_padding_repeated_twice
    return tuple(zip(flat[::2], flat[1::2], strict=True))[::-1]


def stated_padding(conv: _ConvNd) -> str | tuple[int, ...]:
    """The conv's padding as a new one is told of it: that of the attribute, where this is true."""
    padding = conv_padding(conv)
    if padding == _told_padding(conv):
        return conv.padding
    is_even = all(before == after for before, after in padding)
    return tuple(before for before, _ in padding) if is_even else "same"


def _told_padding(conv: _ConvNd) -> Padding:
    """The padding that stands on the conv."""
    weight = getattr(conv, "weight", None)
    sizes = conv.kernel_size if weight is None else weight.shape[2:]
    if conv.padding == "valid":
        return ((0, 0),) * len(sizes)
    if conv.padding == "same":
        dilation = per_axis(conv.dilation, len(sizes))
        totals = [d * (k - 1) for d, k in zip(dilation, sizes, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in per_axis(conv.padding, len(sizes)))


@conv_operator.register(nn.Conv1d)
@conv_operator.register(nn.Conv2d)
@conv_operator.register(nn.Conv3d)
def _(layer: _ConvNd, in_channels: int | None = None) -> ConvOperator:
    reason = own_forward_reason(layer)
    if reason:
        raise NotLinear(reason)
    return kernel_operator(layer)


@conv_operator.register(nn.Linear)
def _(layer: nn.Linear, in_channels: int | None = None) -> ConvOperator:
    check_torch_forward(layer)
    return ConvOperator(layer.weight, layer.bias)


@conv_operator.register(nn.BatchNorm1d)
@conv_operator.register(nn.BatchNorm2d)
@conv_operator.register(nn.BatchNorm3d)
@conv_operator.register(nn.SyncBatchNorm)
def _(layer: _BatchNorm, in_channels: int | None = None) -> ConvOperator:
    if qualified_name(layer) in NORMS_WITH_ACTIVATION:
        return conv_operator.dispatch(object)(layer, in_channels)
    check_torch_forward(layer)
    return _norm_operator(layer)


@conv_operator.register(nn.InstanceNorm1d)
@conv_operator.register(nn.InstanceNorm2d)
@conv_operator.register(nn.InstanceNorm3d)
def _(layer: _InstanceNorm, in_channels: int | None = None) -> ConvOperator:
    check_torch_forward(layer)
    if not layer.track_running_stats:
        raise NotLinear(f"{type(layer).__name__} takes the statistics of each image in eval mode")
    return _norm_operator(layer)


@conv_operator.register(nn.Identity)
@conv_operator.register(_DropoutNd)
def _(layer: nn.Module, in_channels: int | None = None) -> ConvOperator:
    check_torch_forward(layer)
    width = known_width(in_channels, layer)
    return identity(width, ANYTHING, like=torch.empty((), dtype=torch.float64))


@conv_operator.register(nn.AvgPool1d)
@conv_operator.register(nn.AvgPool2d)
@conv_operator.register(nn.AvgPool3d)
def _(layer: nn.Module, in_channels: int | None = None) -> ConvOperator:
    check_torch_forward(layer)
    channels = known_width(in_channels, layer)
    rank = next(r for r, c in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1)
                if isinstance(layer, c))  # fmt: skip
    kernel, stride, padding = (
        per_axis(getattr(layer, name), rank) for name in ("kernel_size", "stride", "padding")
    )
    if getattr(layer, "divisor_override", None) or layer.ceil_mode:
        raise NotLinear("average pooling with ceil_mode or divisor_override is not one conv")
    if any(padding) and not layer.count_include_pad:
        raise NotLinear(
            "border: average pooling with count_include_pad=False divides by another number there"
        )
    weight = torch.full((channels, 1, *kernel), 1 / prod(kernel), dtype=torch.float64)
    return ConvOperator(weight, None, stride, tuple((p, p) for p in padding), groups=channels)


def _norm_operator(layer: nn.Module) -> ConvOperator:
    """y = weight (x - mean) / sqrt(var + eps) + bias, with the running statistics."""
    if "forward" in vars(layer):
        raise NotLinear(f"{type(layer).__name__} has a forward of its own")
    mean, var = layer.running_mean, layer.running_var
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise NotLinear(
            f"{type(layer).__name__} keeps no running statistics (track_running_stats=False), "
            "so it is not affine in eval mode"
        )
    weight, bias = (t if isinstance(t, Tensor) else None for t in (layer.weight, layer.bias))
    eps = float(layer.eps)  # type: ignore[arg-type]
    return norm_operator(mean, var, weight, bias, eps, norm_axes(layer))


def norm_operator(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, axes: Axes
) -> ConvOperator:
    """y = weight (x - mean) / sqrt(var + eps) + bias; all are (C,). axes: of the maps it takes."""
    if var.is_meta:  # arithmetic without values takes torch a hundred times as long
        factor = shift = torch.empty_like(var)
    else:
        factor = torch.rsqrt(var + eps)
        if weight is not None:
            factor = factor * weight
        shift = -mean * factor if bias is None else bias - mean * factor
    weight = factor.reshape(-1, 1, *(1,) * (axes.rank or 0))
    return ConvOperator(weight, shift, groups=factor.shape[0], axes=axes)


def check_torch_forward(layer: nn.Module) -> None:
    if reason := overriding_reason(layer):
        raise NotLinear(reason)


def known_width(in_channels: int | None, layer: nn.Module) -> int:
    if in_channels is None:
        raise NotLinear(f"the number of channels that {type(layer).__name__} sees is not known")
    return in_channels


def per_axis(value: Any, rank: int) -> tuple[int, ...]:
    """A setting of a layer for each of its axes; torch takes one number for all of them too."""
    given = (value,) if isinstance(value, int) else tuple(value)
    return tuple(map(int, given * rank if len(given) == 1 else given))
