"""Adds the branches of other blocks: ACNet, UniRepLKNet, ExpandNets, DO-Conv, DBB, a 2-d DCT bank.

As those of the paper (`branches`), each is a sequence of convs of which one has the geometry of the
conv that the block replaces, and the others are pointwise and without bias.
"""

from __future__ import annotations

from itertools import product
from math import pi, prod

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.branches import FrequencyFilter, SequenceBranch, kaiming

# What ExpandNets and their followers widen both channels of a conv by.
EXPANSION_RATIO = 4


class InnerKernel(SequenceBranch):
    """A smaller kernel in the middle of the conv's: ACNet's 1 x k, UniRepLKNet's dilated ones.

    weight: (C_out, C_in / groups, *kernel_size). rate: its taps lie this far apart.
    """

    def __init__(self, conv: ConvOperator, kernel_size: tuple[int, ...], *, rate: int = 1) -> None:
        super().__init__(conv)
        self.rate = rate
        self.weight = kaiming(conv, (*conv.weight.shape[:2], *kernel_size))

    def layers(self) -> tuple[ConvOperator, ...]:
        return (self.centred(self.weight, self.groups, rate=self.rate),)


class DepthwiseAverage(SequenceBranch):
    """The average of each channel's taps: DBB's branch for depthwise convs, without parameters."""

    pool: Tensor

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        shape = (conv.in_channels, 1, *conv.kernel_size)
        self.register_buffer("pool", conv.weight.new_full(shape, 1 / prod(conv.kernel_size)))

    def layers(self) -> tuple[ConvOperator, ...]:
        return (self.spatial(self.pool, self.pool.shape[0]),)


class Expanded(SequenceBranch):
    """1 x 1 - k x k - 1 x 1, wider by the ratio r inside (Guo et al. 2020, ExpandNet-CL).

    first: (r C_in, C_in / groups, 1, ...), kernel: (r C_out, r C_in / groups, *K), last: (C_out,
    r C_out / groups, 1, ...).
    """

    def __init__(self, conv: ConvOperator, *, ratio: int = EXPANSION_RATIO) -> None:
        super().__init__(conv)
        wide_in, wide_out = ratio * conv.in_channels, ratio * conv.out_channels
        ones, groups = (1,) * conv.rank, conv.groups
        self.first = kaiming(conv, (wide_in, conv.in_channels // groups, *ones), negative_slope=1)
        shape = (wide_out, wide_in // groups, *conv.kernel_size)
        self.kernel = kaiming(conv, shape, negative_slope=1)
        self.last = kaiming(conv, (conv.out_channels, wide_out // groups, *ones), negative_slope=1)

    def layers(self) -> tuple[ConvOperator, ...]:
        first = ConvOperator(self.first, groups=self.groups)
        last = ConvOperator(self.last, groups=self.groups)
        return first, self.spatial(self.kernel, self.groups), last


class OverParameterized(SequenceBranch):
    """A kernel behind a depthwise one: W'[o, i, k] = sum_s D[i, k, s] W[o, i, s].

    Cao et al. 2020 (DO-Conv), Eq. 5 and 6, with D_mul = prod(K). D starts as the identity, and is
    stored as its difference from it, so weight decay pulls it there. With groups, D is that of the
    input channel i, as in a depthwise conv followed by a grouped one.

    weight: (C_out, C_in / groups, *K), the taps counted by s. depthwise: (C_in, s, *K).
    """

    identity: Tensor

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        self.in_channels, taps = conv.in_channels, prod(conv.kernel_size)
        self.weight = kaiming(conv, conv.weight.shape)
        zeros = conv.weight.new_zeros(conv.in_channels, taps, *conv.kernel_size)
        self.depthwise = nn.Parameter(zeros)
        eye = torch.eye(taps, dtype=zeros.dtype, device=zeros.device)
        self.register_buffer("identity", eye.reshape(taps, *conv.kernel_size))

    def layers(self) -> tuple[ConvOperator, ...]:
        depthwise = (self.depthwise + self.identity).flatten(0, 1).unsqueeze(1)
        ones = (1,) * len(self.kernel_size)
        pointwise = self.weight.flatten(1).reshape(self.weight.shape[0], -1, *ones)
        first = self.spatial(depthwise, self.in_channels)
        return first, ConvOperator(pointwise, groups=self.groups)


class DCTFilter(FrequencyFilter):
    """1 x 1 - frequency filter with the waves of the 2-d discrete cosine transform.

    Qin et al. 2021 (FcaNet), Eq. 2, see dct_bank. In the paper's own bank (frequency_prior) a
    channel varies along one axis only, and where its frequency is a multiple of K it is zero.
    """

    @staticmethod
    def filters(channels: int, kernel_size: tuple[int, ...]) -> Tensor:
        return dct_bank(channels, kernel_size)


def dct_bank(channels: int, kernel_size: tuple[int, ...]) -> Tensor:
    """The waves of the discrete cosine transform, (C_out, *K), in float64.

    F[c, h, w] = cos(u_c (h + 0.5) pi / K_H) cos(v_c (w + 0.5) pi / K_W), 0 <= u_c < K_H,
    0 <= v_c < K_W: each pair but (0, 0), which an average pool is, from low to high u + v; the
    channels are shared evenly among them.
    """
    pairs = sorted(product(*map(range, kernel_size)), key=lambda pair: (sum(pair), pair))[1:]
    bank = torch.ones(channels, *kernel_size, dtype=torch.float64)
    for c in range(channels if pairs else 0):
        frequencies = pairs[c * len(pairs) // channels]
        for axis, (u, size) in enumerate(zip(frequencies, kernel_size, strict=True)):
            place = (torch.arange(size, dtype=torch.float64) + 0.5) * pi / size
            bank[c] *= torch.cos(u * place).reshape(-1, *(1,) * (len(kernel_size) - axis - 1))
    return bank
