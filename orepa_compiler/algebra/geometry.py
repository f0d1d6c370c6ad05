"""Describes a convolution without its weights: which maps it reads and gives, and how.

Two operators may become one where their geometries agree. Parallel ones need taps on one lattice;
sequential ones need a border that agrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from orepa_compiler.algebra.maps import Axes, Maps
from orepa_compiler.errors import NotLinear

Padding = tuple[tuple[int, int], ...]


class Geometry:
    """What is known of a convolution from shapes alone.

    stride, dilation: one per axis. padding: (before, after) per axis; a negative one crops.
    padding_mode: what stands beyond the border, as in torch.nn.Conv2d.
    axes: where the channels of its maps stand. A kernel has as many axes as stand behind them; one
    without axes is that of a linear layer, or of a norm or a factor, for maps of several ranks.
    """

    stride: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    axes: Axes | None

    @property
    def kernel_size(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def in_channels(self) -> int:
        raise NotImplementedError

    @property
    def out_channels(self) -> int:
        raise NotImplementedError

    @property
    def has_bias(self) -> bool:
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """The number of kernel axes."""
        return len(self.kernel_size)

    @property
    def reads(self) -> Maps:
        return Maps(self.in_channels, self._axes)

    @property
    def gives(self) -> Maps:
        return Maps(self.out_channels, self._axes)

    @property
    def _axes(self) -> Axes:
        assert self.axes is not None  # set when it was made
        return self.axes

    @property
    def extent(self) -> tuple[int, ...]:
        """How many pixels the kernel spans on each axis, dilation included."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))

    def slack(self, axis: int) -> int:
        """output size = (input size + slack) // stride + 1."""
        return sum(self.padding[axis]) - self.extent[axis]

    @property
    def is_pointwise(self) -> bool:
        """Whether each output pixel reads just the input pixel at its own place."""
        return (
            all(k == 1 for k in self.kernel_size)
            and all(s == 1 for s in self.stride)
            and all(p == (0, 0) for p in self.padding)
        )

    @property
    def has_padding(self) -> bool:
        return any(before > 0 or after > 0 for before, after in self.padding)

    @property
    def is_same_padded(self) -> bool:
        """Whether the padding is torch's asymmetric padding="same" (even kernels)."""
        totals = [extent - 1 for extent in self.extent]
        return (
            all(s == 1 for s in self.stride)
            and self.padding == tuple((t // 2, t - t // 2) for t in totals)
            and any(t % 2 for t in totals)
        )


@dataclass(frozen=True)
class SumAxis:
    """Where the taps of two kernels lie on the common lattice of one axis."""

    count: int
    dilation: int
    offsets: tuple[int, int]
    spacings: tuple[int, int]
    padding: tuple[int, int]


def sum_axis(left: Geometry, right: Geometry, axis: int) -> SumAxis:
    ops = (left, right)
    starts = [-op.padding[axis][0] for op in ops]
    sizes = [op.kernel_size[axis] for op in ops]
    steps = [op.dilation[axis] if k > 1 else 0 for op, k in zip(ops, sizes, strict=True)]
    step = gcd(*steps, starts[0] - starts[1]) or 1
    start = min(starts)
    end = max(s + d * (k - 1) for s, d, k in zip(starts, steps, sizes, strict=True))
    # Of two outputs that agree in size for every input divisible by the stride, keep the shorter.
    slack = min(op.slack(axis) for op in ops)
    return SumAxis(
        count=(end - start) // step + 1,
        dilation=step,
        offsets=((starts[0] - start) // step, (starts[1] - start) // step),
        spacings=(max(steps[0] // step, 1), max(steps[1] // step, 1)),
        padding=(-start, slack + (end - start + 1) + start),
    )


def check_parallel(left: Geometry, right: Geometry) -> None:
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
        sizes = [op.slack(axis) // stride for op in (left, right)]
        if sizes[0] != sizes[1]:
            raise NotLinear(
                f"cannot add outputs that differ by {abs(sizes[0] - sizes[1])} pixels on axis "
                f"{axis}: kernels {left.kernel_size} and {right.kernel_size}, "
                f"paddings {left.padding} and {right.padding}"
            )


def joint_padding_mode(left: Geometry, right: Geometry) -> str:
    modes = {op.padding_mode for op in (left, right) if op.has_padding}
    if len(modes) > 1:
        raise NotLinear(
            f"cannot join paddings {left.padding_mode!r} and {right.padding_mode!r}: "
            "they see different values beyond the border"
        )
    return modes.pop() if modes else left.padding_mode


def border_reason(outer: Geometry, inner: Geometry) -> str | None:
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
        if outer.padding_mode == "zeros" and inner.has_bias:
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


def _keeps_size(op: Geometry, axis: int) -> bool:
    """A periodic signal stays periodic: circular padding, stride 1, output as large as input."""
    circular = op.padding_mode == "circular" or max(op.padding[axis]) <= 0
    return circular and op.stride[axis] == 1 and op.slack(axis) == -1
