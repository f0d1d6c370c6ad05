"""Defines the branches of a block: small modules that hold parameters and give an operator.

A branch never sees a feature map in training. It is a sequence of convs, each a ConvOperator, and
its operator is their composition (Hu et al. 2022, Eq. 3). All convs of a branch but one are
pointwise and without bias, so the composition is exact at the border: the geometry (stride,
padding, dilation) of the conv that the block replaces sits on the k x k one.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import reduce
from math import pi, prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.kernels import pad
from orepa_compiler.algebra.operators import ConvOperator

# A depthwise layer gives this many channels per input channel (Hu et al. 2022, Sec. 3.5).
DEPTHWISE_MULTIPLIER = 8
# Above this number of groups the reference implementation doubles the channels inside a
# 1x1 - kxk branch, since a group alone is then too narrow.
WIDE_GROUPS = 4


class Branch(Protocol):
    """A module with parameters that gives its operator, differentiable with respect to them."""

    def operator(self) -> ConvOperator: ...


class Geometry(nn.Module):
    """Where a kernel is applied: everything about a conv but its weight and bias.

    pads: (before, after) per axis.
    """

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__()
        self.stride, self.pads = conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups
        self.padding_mode = conv.padding_mode
        self.kernel_size = conv.kernel_size

    def spatial(self, weight: Tensor, groups: int) -> ConvOperator:
        """A kernel with the taps of the conv."""
        return ConvOperator(
            weight, None, self.stride, self.pads, self.dilation, groups, self.padding_mode
        )

    def centred(self, weight: Tensor, groups: int, *, rate: int = 1) -> ConvOperator:
        """A smaller kernel, its centre tap on the conv's, floor((K - 1) / 2) (supplement Eq. 1).

        rate: its taps lie this many taps of the conv apart.
        """
        dilation = tuple(rate * d for d in self.dilation)
        padding = []
        sizes = zip(
            self.pads, self.dilation, self.kernel_size, dilation, weight.shape[2:], strict=True
        )
        for (before, after), d, k, own, taps in sizes:
            start = d * ((k - 1) // 2) - own * ((taps - 1) // 2)
            end = d * (k - 1) - start - own * (taps - 1)
            padding.append((before - start, after - end))
        return ConvOperator(
            weight, None, self.stride, tuple(padding), dilation, groups, self.padding_mode
        )


class SequenceBranch(Geometry):
    """A branch that is a sequence of convs; subclasses give them, the innermost first."""

    @abstractmethod
    def layers(self) -> tuple[ConvOperator, ...]:
        """The convs of the branch, in the order in which a feature map would meet them."""

    def operator(self) -> ConvOperator:
        """W_e = W_N * (... (W_2 * W_1))                          (Hu et al. 2022, Eq. 3)"""
        return reduce(lambda inner, outer: outer.after(inner), self.layers())

    def forward(self, x: Tensor) -> Tensor:
        """The branch on feature maps, one conv after the other: what the squeeze avoids."""
        return reduce(lambda value, layer: layer(value), self.layers(), x)


class Kernel(SequenceBranch):
    """k x k: the kernel itself, (C_out, C_in / groups, *K)."""

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        self.weight = kaiming(conv, conv.weight.shape)

    def layers(self) -> tuple[ConvOperator, ...]:
        return (self.spatial(self.weight, self.groups),)


class Pointwise(SequenceBranch):
    """1 x 1 at the centre tap: weight (C_out, C_in / groups, 1, ...)."""

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        self.weight = kaiming(conv, point_shape(conv.weight))

    def layers(self) -> tuple[ConvOperator, ...]:
        return (self.centred(self.weight, self.groups),)


class PointwiseKernel(SequenceBranch):
    """1 x 1 - k x k: the 1 x 1 starts as the identity (Hu et al. 2022, Fig. 6, supplement Table 1).

    The 1 x 1 is stored as its difference from the identity, so weight decay pulls it to the
    identity and not to zero. pointwise: (T, C_in / groups, 1, ...), kernel: (C_out, T / groups,
    *K), with T = copies C_in: 2 of them in many groups.
    """

    def __init__(self, conv: ConvOperator, *, copies: int | None = None) -> None:
        super().__init__(conv)
        width = conv.weight.shape[1]
        copies = copies or (1 if conv.groups <= WIDE_GROUPS else 2)
        inside = conv.in_channels * copies
        ones = (1,) * conv.rank
        like = conv.weight
        self.pointwise = nn.Parameter(like.new_zeros(inside, width, *ones))
        shape = (conv.out_channels, inside // conv.groups, *conv.kernel_size)
        self.kernel = kaiming(conv, shape)

    def layers(self) -> tuple[ConvOperator, ...]:
        first = ConvOperator(identity_kernel(self.pointwise) + self.pointwise, groups=self.groups)
        return first, self.spatial(self.kernel, self.groups)


class AveragePool(SequenceBranch):
    """1 x 1 - average pool: W[o, i] / prod(K) at every tap.

    weight: (C_out, C_in / groups, 1, ...).
    """

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        self.weight = kaiming(conv, point_shape(conv.weight))

    def layers(self) -> tuple[ConvOperator, ...]:
        first = ConvOperator(self.weight, groups=self.groups)
        channels = self.weight.shape[0]
        pool = self.weight.new_full((channels, 1, *self.kernel_size), 1 / prod(self.kernel_size))
        return first, self.spatial(pool, channels)


class FrequencyFilter(SequenceBranch):
    """1 x 1 - frequency filter: W[o, i] F[o, taps], with fixed cosines F.

    Hu et al. 2022, Sec. 3.5. weight: (C_out, C_in / groups, 1, ...). prior: (C_out, 1, *K), see
    frequency_prior.
    """

    prior: Tensor

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        self.weight = kaiming(conv, point_shape(conv.weight))
        prior = self.filters(conv.out_channels, conv.kernel_size).to(conv.weight)
        self.register_buffer("prior", prior.unsqueeze(1))

    @staticmethod
    def filters(channels: int, kernel_size: tuple[int, ...]) -> Tensor:
        """The fixed filters, (C_out, *K)."""
        return frequency_prior(channels, kernel_size)

    def layers(self) -> tuple[ConvOperator, ...]:
        first = ConvOperator(self.weight, groups=self.groups)
        return first, self.spatial(self.prior, self.weight.shape[0])


class DepthwisePointwise(SequenceBranch):
    """depthwise k x k - 1 x 1, with no activation between (Hu et al. 2022, Sec. 3.5).

    depthwise: (8 C_in, 1, *K), pointwise: (C_out, 8 C_in / groups, 1, ...).
    """

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        inside = DEPTHWISE_MULTIPLIER * conv.in_channels
        self.in_channels = conv.in_channels
        self.depthwise = kaiming(conv, (inside, 1, *conv.kernel_size))
        shape = (conv.out_channels, inside // conv.groups, *(1,) * conv.rank)
        self.pointwise = kaiming(conv, shape)

    def layers(self) -> tuple[ConvOperator, ...]:
        first = self.spatial(self.depthwise, self.in_channels)
        return first, ConvOperator(self.pointwise, groups=self.groups)


class PointwisePointwise(SequenceBranch):
    """1 x 1 - 1 x 1, for a 1 x 1 conv: the square one of the two starts as the identity.

    first: (T, C_in / groups, 1, ...), second: (C_out, T / groups, 1, ...), T = min(C_in, C_out).
    """

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        groups, ones = conv.groups, (1,) * conv.rank
        inside = min(conv.in_channels, conv.out_channels)
        first = (inside, conv.in_channels // groups, *ones)
        second = (conv.out_channels, inside // groups, *ones)
        square = conv.weight.new_empty(inside, inside // groups, *ones)
        identity = nn.Parameter(identity_kernel(square))
        widens = conv.out_channels > conv.in_channels
        self.first = identity if widens else kaiming(conv, first, negative_slope=1.0)
        self.second = kaiming(conv, second, negative_slope=1.0) if widens else identity

    def layers(self) -> tuple[ConvOperator, ...]:
        return ConvOperator(self.first, groups=self.groups), self.spatial(self.second, self.groups)


class Identity(SequenceBranch):
    """The input itself, at the centre tap, for convs that keep width and size."""

    one: Tensor

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        ones = conv.weight.new_ones(conv.in_channels, 1, *(1,) * conv.rank)
        self.register_buffer("one", ones)

    def layers(self) -> tuple[ConvOperator, ...]:
        return (self.centred(self.one, self.one.shape[0]),)

    def forward(self, x: Tensor) -> Tensor:
        (one,) = self.layers()
        places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
        return pad(x, one.padding, one.padding_mode)[places]


def frequency_prior(channels: int, kernel_size: tuple[int, ...]) -> Tensor:
    """The fixed cosines of the frequency filter, (C_out, *K), in float64.

    F[c, h, w] = cos((c + 1) (h + 0.5) pi / K_H)                for c < floor(C / 2)
                 cos((c - floor(C / 2) + 1) (w + 0.5) pi / K_W)  otherwise
    (Hu et al. 2022, supplement Table 1). The channels are shared evenly among the axes that have
    more than one tap, so 1-d, 3-d and rectangular kernels follow the same rule.
    """
    axes = [axis for axis, size in enumerate(kernel_size) if size > 1]
    bank = torch.ones(channels, *kernel_size, dtype=torch.float64)
    for index, axis in enumerate(axes):
        start, stop = channels * index // len(axes), channels * (index + 1) // len(axes)
        size = kernel_size[axis]
        frequency = torch.arange(1, stop - start + 1, dtype=torch.float64)
        place = (torch.arange(size, dtype=torch.float64) + 0.5) * pi / size
        shape = [stop - start, *(size if a == axis else 1 for a in range(len(kernel_size)))]
        bank[start:stop] = torch.cos(torch.outer(frequency, place)).reshape(shape)
    return bank


def identity_kernel(like: Tensor) -> Tensor:
    """The 1 x 1 kernel (T, C / groups, 1, ...) whose row t reads channel t mod C / groups."""
    width = like.shape[1]
    eye = torch.eye(width, dtype=like.dtype, device=like.device)
    return eye.repeat(like.shape[0] // width, 1).reshape(like.shape)


def point_shape(weight: Tensor) -> tuple[int, ...]:
    return (*weight.shape[:2], *(1,) * (weight.dim() - 2))


def kaiming(
    conv: ConvOperator, shape: tuple[int, ...], *, negative_slope: float = 0.0
) -> nn.Parameter:
    """A fresh parameter: uniform in +-sqrt(6 / ((1 + a^2) fan_in)) (He et al. 2015)."""
    weight = torch.empty(shape, dtype=conv.weight.dtype, device=conv.weight.device)
    nn.init.kaiming_uniform_(weight, a=negative_slope)
    return nn.Parameter(weight)
