"""How two convolutions become one: the rules behind `+` and `@` of ConvOperator.

Parallel operators need taps aligned on one lattice; sequential ones need a border
that agrees. Both are decided from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orepa_compiler.algebra.kernels import convolve, spread
from orepa_compiler.errors import NotLinear

if TYPE_CHECKING:
    from orepa_compiler.algebra.operators import ConvOperator


@dataclass(frozen=True)
class SumAxis:
    """Where the taps of two kernels lie on the common lattice of one axis."""

    count: int
    dilation: int
    offsets: tuple[int, int]
    spacings: tuple[int, int]
    padding: tuple[int, int]


def sum_axis(left: ConvOperator, right: ConvOperator, axis: int) -> SumAxis:
    ops = (left, right)
    starts = [-op.padding[axis][0] for op in ops]
    sizes = [op.kernel_size[axis] for op in ops]
    steps = [op.dilation[axis] if k > 1 else 0 for op, k in zip(ops, sizes, strict=True)]
    step = gcd(*steps, starts[0] - starts[1]) or 1
    start = min(starts)
    end = max(s + d * (k - 1) for s, d, k in zip(starts, steps, sizes, strict=True))
    # Of two outputs that agree in size for every input divisible by the stride, keep the shorter.
    slack = min(_slack(op, axis) for op in ops)
    return SumAxis(
        count=(end - start) // step + 1,
        dilation=step,
        offsets=((starts[0] - start) // step, (starts[1] - start) // step),
        spacings=(max(steps[0] // step, 1), max(steps[1] // step, 1)),
        padding=(-start, slack + (end - start + 1) + start),
    )


def _slack(op: ConvOperator, axis: int) -> int:
    """output size = (input size + slack) // stride + 1."""
    return sum(op.padding[axis]) - op.extent[axis]


def check_parallel(left: ConvOperator, right: ConvOperator) -> None:
    channels = [(op.in_channels, op.out_channels) for op in (left, right)]
    if channels[0] != channels[1]:
        (a, b), (c, d) = channels
        raise NotLinear(f"cannot add convs of {a} -> {b} and {c} -> {d} channels")
    if left.stride != right.stride:
        raise NotLinear(
            f"cannot add strides {left.stride} and {right.stride}; "
            "branches of one block must share a stride"
        )
    for axis, stride in enumerate(left.stride):
        sizes = [_slack(op, axis) // stride for op in (left, right)]
        if sizes[0] != sizes[1]:
            raise NotLinear(
                f"cannot add outputs that differ by {abs(sizes[0] - sizes[1])} pixels on axis "
                f"{axis}: kernels {left.kernel_size} and {right.kernel_size}, "
                f"paddings {left.padding} and {right.padding}"
            )


def joint_padding_mode(left: ConvOperator, right: ConvOperator) -> str:
    modes = {op.padding_mode for op in (left, right) if op.has_padding}
    if len(modes) > 1:
        raise NotLinear(
            f"cannot join paddings {left.padding_mode!r} and {right.padding_mode!r}: "
            "they see different values beyond the border"
        )
    return modes.pop() if modes else left.padding_mode


def sum_biases(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def border_reason(outer: ConvOperator, inner: ConvOperator) -> str | None:
    """Why outer(inner(x)) is not one convolution, or None where it is.

    Padding between the two stands for what the composed conv would compute out there. It does so
    if there is none; or if `inner` is pointwise and maps the padding on itself.
    """
    if outer.has_padding and inner.has_padding and outer.padding_mode != inner.padding_mode:
        return (
            f"a conv padded with {outer.padding_mode!r} after one padded with "
            f"{inner.padding_mode!r}: one conv has one padding mode"
        )
    for axis, padding in enumerate(outer.padding):
        if max(padding) <= 0:
            continue
        if outer.padding_mode == "circular" and _keeps_size(inner, axis):
            continue
        if inner.kernel_size[axis] != 1 or inner.padding[axis] != (0, 0):
            return (
                f"border: padding {padding} before the second conv cuts off what the first one "
                f"(kernel {inner.kernel_size}) gives beyond the border; "
                "put all the padding on the first conv"
            )
        if outer.padding_mode == "zeros" and inner.bias is not None:
            return (
                "border: the first conv has a bias, so what it gives beyond the border is the "
                f"bias and not the zeros that padding {padding} puts there; pad with that bias, "
                "or put the padding on the first conv"
            )
        if outer.padding_mode != "zeros" and inner.stride[axis] != 1:
            return (
                f"border: {outer.padding_mode!r} padding after stride {inner.stride[axis]} is not "
                "the stride of the padded input"
            )
    return None


def _keeps_size(op: ConvOperator, axis: int) -> bool:
    """A periodic signal stays periodic: circular padding, stride 1, output as large as input."""
    circular = op.padding_mode == "circular" or max(op.padding[axis]) <= 0
    return circular and op.stride[axis] == 1 and _slack(op, axis) == -1


def compose_kernels(
    outer: ConvOperator, inner: ConvOperator
) -> tuple[Tensor, int, tuple[int, ...]]:
    """The kernel of outer @ inner with its groups and dilation."""
    groups = gcd(outer.groups, inner.groups)
    if outer.groups > groups and inner.groups > groups:
        outer = outer.regroup(groups)
    dilation, inner_spacings, outer_spacings = [], [], []
    for axis in range(outer.rank):
        first = inner.dilation[axis] if inner.kernel_size[axis] > 1 else 0
        second = inner.stride[axis] * outer.dilation[axis] if outer.kernel_size[axis] > 1 else 0
        step = gcd(first, second) or 1
        dilation.append(step)
        inner_spacings.append(max(first // step, 1))
        outer_spacings.append(max(second // step, 1))
    second_kernel = spread(outer.weight, outer_spacings)
    first_kernel = spread(inner.weight, inner_spacings)
    # Where one side has the finer groups, its blocks are composed one by one and never densified.
    pieces = max(outer.groups, inner.groups) // groups
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


def compose_biases(outer: ConvOperator, inner: ConvOperator) -> Tensor | None:
    """b_2 + sum_taps W_2 b_1."""
    if inner.bias is None:
        return outer.bias
    if inner.bias.is_meta:
        return inner.bias.new_empty(outer.out_channels)
    taps = outer.weight.flatten(2).sum(2) if outer.rank else outer.weight
    taps = taps.reshape(outer.groups, -1, taps.shape[1])
    carried = torch.einsum("got,gt->go", taps, inner.bias.reshape(outer.groups, -1)).flatten()
    return sum_biases(outer.bias, carried)
