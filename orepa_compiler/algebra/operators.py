"""Adds and composes convolutions: values closed under parallel sum and sequential composition.

    (A + B)(x) == A(x) + B(x)        Eq. 4 of Hu et al. 2022, kernels aligned tap by tap
    (A @ B)(x) == A(B(x))            Eq. 3, a true convolution of the two kernels
    A.scale(f)(x) == f * A(x)        a scaling layer

Every rule is exact, at the border too, or raises NotLinear with the reason. No rule looks at a
tensor's values: "no bias" is None and not zeros, so the same algebra runs on the meta device and
under autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orepa_compiler.algebra.geometry import (
    Geometry,
    Padding,
    border_reason,
    check_parallel,
    joint_padding_mode,
    sum_axis,
)
from orepa_compiler.algebra.kernels import (
    CONV,
    compose_biases,
    compose_kernels,
    pad,
    place,
    regroup,
    sum_biases,
)
from orepa_compiler.algebra.maps import LAST, Axes, kernel_axes, second
from orepa_compiler.errors import NotLinear

CONV_MODULES: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


@dataclass(frozen=True, eq=False)
class ConvOperator(Geometry):
    """x -> conv(x, weight) + bias, as a value.

    weight: (C_out, C_in / groups, *kernel), with 0 to 3 kernel axes (0: a linear layer).
    bias: (C_out,), or None. stride, padding, dilation, groups, padding_mode, axes: its Geometry.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...] = ()
    padding: Padding = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    axes: Axes | None = None

    def __post_init__(self) -> None:
        rank = self.weight.dim() - 2
        axes = self.axes or kernel_axes(rank)
        assert not rank or axes.rank == rank, f"a kernel with {rank} axes is not for {axes}"
        object.__setattr__(self, "axes", axes)
        defaults = {"stride": (1,) * rank, "dilation": (1,) * rank, "padding": ((0, 0),) * rank}
        for name, default in defaults.items():
            value = tuple(getattr(self, name)) or default
            assert len(value) == rank, f"{name} {value} does not fit a kernel with {rank} axes"
            object.__setattr__(self, name, value)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one output position."""
        return self.weight.numel()

    def __repr__(self) -> str:
        kernel = "x".join(map(str, self.kernel_size)) or "linear"
        return (
            f"ConvOperator({self.in_channels} -> {self.out_channels}, {kernel}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None})"
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution of x, (N, C_in, *size)."""
        if self._axes.place != LAST and not self.rank:
            return self.over(self._axes.meet(second(x.dim() - 2)))._on_second(x)
        if self.rank == 0:
            return F.linear(x, self.regroup(1).weight, self.bias)
        padding: Sequence[int] = tuple(before for before, _ in self.padding)
        plain = all(before == after >= 0 for before, after in self.padding)
        if not plain or (self.has_padding and self.padding_mode != "zeros"):
            x, padding = pad(x, self.padding, self.padding_mode), (0,) * self.rank
        conv = CONV[self.rank]
        return conv(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _on_second(self, x: Tensor) -> Tensor:
        """A pointwise operator on maps of any rank: pixel by pixel."""
        pixels = F.linear(x.movedim(1, -1), self.regroup(1).weight.flatten(1), self.bias)
        return pixels.movedim(-1, 1)

    def __add__(self, other: ConvOperator) -> ConvOperator:
        return self.beside(other)

    def __matmul__(self, inner: ConvOperator) -> ConvOperator:
        return self.after(inner)

    # Methods behind the operators: torch.compile follows a method call, not `@` on our own type.

    def beside(self, other: ConvOperator) -> ConvOperator:
        """The two operators side by side on one input.

        W_e = W_1 + W_2, b_e = b_1 + b_2                    (Hu et al. 2022, Eq. 4)

        Kernels are aligned tap by tap on the coarsest lattice that holds both, so a dilated sum
        stays dilated. Raises NotLinear where the two outputs differ in size or stride, or see
        different values beyond the border.
        """
        left, right = _agreed(self, other)
        check_parallel(left, right)
        mode = joint_padding_mode(left, right)
        groups = gcd(left.groups, right.groups)
        axes = [sum_axis(left, right, axis) for axis in range(left.rank)]
        weights = [
            place(
                op.regroup(groups).weight,
                counts=[a.count for a in axes],
                offsets=[a.offsets[side] for a in axes],
                spacings=[a.spacings[side] for a in axes],
            )
            for side, op in enumerate((left, right))
        ]
        bias = sum_biases(left.bias, right.bias)
        return ConvOperator(
            weights[0] + weights[1],
            bias,
            left.stride,
            tuple(a.padding for a in axes),
            tuple(a.dilation for a in axes),
            groups,
            mode,
            left.axes,
        )

    def after(self, inner: ConvOperator) -> ConvOperator:
        """This operator after `inner`.

        W_e = W_2 * W_1 (a true convolution), b_e = b_2 + sum_taps W_2 b_1
                                                  (Hu et al. 2022, Eq. 3 and supplement Eq. 2)

        Exact only where the padding between the two carries what the composed conv would compute
        there; otherwise raises NotLinear.
        """
        outer, inner = _agreed(self, inner)
        if outer.in_channels != inner.out_channels:
            raise NotLinear(
                f"a conv that reads {outer.in_channels} channels cannot follow one that gives "
                f"{inner.out_channels}"
            )
        reason = border_reason(outer, inner)
        if reason:
            raise NotLinear(reason)
        weight, groups, dilation = compose_kernels(outer.weight, outer, inner.weight, inner)
        strides = list(zip(inner.stride, outer.stride, strict=True))
        padding = tuple(
            (p1[0] + s1 * p2[0], p1[1] + s1 * p2[1])
            for p1, p2, s1 in zip(inner.padding, outer.padding, inner.stride, strict=True)
        )
        return ConvOperator(
            weight,
            outer.bias_after(inner.bias),
            tuple(s1 * s2 for s1, s2 in strides),
            padding,
            dilation,
            groups,
            outer.padding_mode if outer.has_padding else inner.padding_mode,
            outer.axes,
        )

    def bias_after(self, bias: Tensor | None) -> Tensor | None:
        """b_2 + sum_taps W_2 b_1: its bias behind a conv of that bias, where no border is near."""
        return compose_biases(self.weight, self.groups, self.bias, bias)

    def scale(self, factor: Tensor) -> ConvOperator:
        """The operator followed by a scaling layer.

        W'_o = factor_o W_o,  b'_o = factor_o b_o           (Hu et al. 2022, Sec. 3.2)

        factor: (C_out,), or (1,) for one factor on all channels.
        """
        column = factor.reshape(-1, *(1,) * (self.rank + 1))
        bias = None if self.bias is None else self.bias * factor
        return replace(self, weight=self.weight * column, bias=bias)

    def with_rank(self, rank: int) -> ConvOperator:
        """The same operator over feature maps with `rank` spatial axes, if they are among its own.

        Raises NotLinear where they are not.
        """
        return self.over(self._axes.meet(second(rank)))

    def over(self, axes: Axes) -> ConvOperator:
        """The same operator over some of its maps alone."""
        rank = axes.rank or 0
        if rank == self.rank:
            return replace(self, axes=axes)
        assert not self.rank
        return ConvOperator(
            self.weight.reshape(*self.weight.shape[:2], *(1,) * rank),
            self.bias,
            groups=self.groups,
            padding_mode=self.padding_mode,
            axes=axes,
        )

    def regroup(self, groups: int) -> ConvOperator:
        """The same operator written with fewer groups: block-diagonal kernels filled with zeros."""
        if groups == self.groups:
            return self
        return replace(self, weight=regroup(self.weight, self.groups, groups), groups=groups)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> ConvOperator:
        """The same operator in another precision, or on another device."""
        device = self.weight.device if device is None else device
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return replace(self, weight=self.weight.to(device, dtype), bias=bias)

    def with_bias(self, bias: Tensor | None) -> ConvOperator:
        """The same kernel with this bias in place of its own."""
        return replace(self, bias=bias)

    def to_module(self) -> nn.Module:
        """A plain layer that computes this operator: nn.Conv1d, 2d, 3d, or nn.Linear.

        Raises NotLinear where it is for maps of several ranks, as a norm may be: no one layer is.
        Padding that nn.ConvNd cannot express becomes padding="same" where that is what it is, else
        zero taps at the border of the kernel.
        """
        if self._axes.rank is None:
            raise NotLinear(f"no one conv and no linear layer reads {self._axes}")
        if self.rank == 0:
            linear = nn.Linear(
                self.in_channels, self.out_channels, self.bias is not None, device="meta"
            )
            return _filled(linear, self.regroup(1).weight, self.bias)
        op = self if self.is_same_padded else _symmetric(self)
        padding = "same" if self.is_same_padded else tuple(before for before, _ in op.padding)
        conv = CONV_MODULES[op.rank](
            op.in_channels,
            op.out_channels,
            op.kernel_size,  # type: ignore[arg-type]
            op.stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            op.dilation,  # type: ignore[arg-type]
            op.groups,
            op.bias is not None,
            op.padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        return _filled(conv, op.weight, op.bias)


def identity(channels: int, axes: Axes | int, *, like: Tensor) -> ConvOperator:
    """The operator that gives its input back: one tap of 1 per channel.

    axes: where the channels stand, or the number of axes behind them (0: a linear layer's maps).
    like: gives dtype and device.
    """
    axes = kernel_axes(axes) if isinstance(axes, int) else axes
    shape = (channels, 1, *(1,) * (axes.rank or 0))
    weight = torch.ones(shape, dtype=like.dtype, device=like.device)
    return ConvOperator(weight, groups=channels, axes=axes)


def _agreed(left: ConvOperator, right: ConvOperator) -> tuple[ConvOperator, ConvOperator]:
    """Both operators over the maps that suit both. Raises NotLinear where there are none."""
    assert left.axes is not None
    assert right.axes is not None
    axes = left.axes.meet(right.axes)
    return left.over(axes), right.over(axes)


def _symmetric(op: ConvOperator) -> ConvOperator:
    """The same operator with equal, non-negative padding on both sides, by zero taps."""
    if all(before == after >= 0 for before, after in op.padding):
        return op
    counts, offsets, spacings, dilation, padding = [], [], [], [], []
    for (before, after), d, k in zip(op.padding, op.dilation, op.kernel_size, strict=True):
        wide = max(before, after, 0)
        step = gcd(d if k > 1 else 0, wide - before, wide - after) or 1
        counts.append((d * (k - 1) + (wide - before) + (wide - after)) // step + 1)
        offsets.append((wide - before) // step)
        spacings.append(max(d // step, 1) if k > 1 else 1)
        dilation.append(step)
        padding.append((wide, wide))
    weight = place(op.weight, counts=counts, offsets=offsets, spacings=spacings)
    return replace(op, weight=weight, padding=tuple(padding), dilation=tuple(dilation))


def _filled(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The module with these parameters: contiguous, detached, and in memory of their own."""
    module.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(memory_format=torch.contiguous_format))
    return module
