"""Lists the published blocks: those of the paper, and those of the field it compares with.

Exchange branches or scaling layers with dataclasses.replace; docs/blocks.md shows it, and how each
ablation of the paper is written.
"""

from __future__ import annotations

from math import prod
from typing import Literal

from torch import nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import Block, BranchMaker, BranchSum
from orepa_compiler.branches import (
    AveragePool,
    DepthwisePointwise,
    FrequencyFilter,
    Identity,
    Kernel,
    Pointwise,
    PointwiseKernel,
    PointwisePointwise,
    SequenceBranch,
)
from orepa_compiler.branches.field import (
    DepthwiseAverage,
    Expanded,
    InnerKernel,
    OverParameterized,
)
from orepa_compiler.errors import ReparamError
from orepa_compiler.generation.together import generate_together

# The kernel that is a large stem (Hu et al. 2022, Sec. 3.5) is at least this wide.
LARGE_KERNEL = 7
# A stem reads images; stacked convs in the place of a wide large kernel would dwarf it.
STEM_CHANNELS = 16
# Ding et al. 2024 (UniRepLKNet), the settings of their code: K -> (kernel, dilation) of each branch
# beside the K x K, all of them depthwise. Each spans at most K taps.
DILATED_KERNELS = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class DeepStem(SequenceBranch):
    """Stacked k x k as 3 x 3 - 3 x 3 - ...: the linear deep stem (Hu et al. 2022, Sec. 3.5).

    (K - 1) / 2 layers, each an OREPA 3 x 3 kernel with C_out channels. All the padding is on the
    first and the stride on the last, so that their composition is exactly one K x K conv.
    """

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        depth = (conv.kernel_size[0] - 1) // 2
        self.stack = nn.ModuleList(
            BranchSum(_stem_layer(conv, index, depth), OREPA) for index in range(depth)
        )

    def layers(self) -> tuple[ConvOperator, ...]:
        return tuple(generate_together(list(self.stack)))  # type: ignore[arg-type]


def _stem_layer(conv: ConvOperator, index: int, depth: int) -> ConvOperator:
    width = conv.in_channels if index == 0 else conv.out_channels
    return ConvOperator(
        conv.weight.new_empty(conv.out_channels, width, *(3,) * conv.rank),
        stride=conv.stride if index == depth - 1 else (),
        padding=conv.padding if index == 0 else (),
        dilation=conv.dilation,
        padding_mode=conv.padding_mode,
    )


def spatial_only(maker: BranchMaker) -> BranchMaker:
    """The branch, for convs with more than one tap."""
    return lambda conv: maker(conv) if prod(conv.kernel_size) > 1 else None


def pointwise_only(maker: BranchMaker) -> BranchMaker:
    """The branch, for convs with a single tap."""
    return lambda conv: maker(conv) if prod(conv.kernel_size) == 1 else None


def large_only(maker: BranchMaker) -> BranchMaker:
    """The branch, for large kernels that 3 x 3 convs can be stacked to."""
    return lambda conv: maker(conv) if is_large_stem(conv) else None


def same_size_only(maker: BranchMaker) -> BranchMaker:
    """The branch, for convs with stride 1 that keep the number of channels."""

    def make(conv: ConvOperator) -> nn.Module | None:
        keeps = conv.in_channels == conv.out_channels and set(conv.stride) == {1}
        return maker(conv) if keeps else None

    return make


def is_large_stem(conv: ConvOperator) -> bool:
    """Whether the conv is dense, reads few channels, and is large, odd and square (or cubic)."""
    sizes = set(conv.kernel_size)
    is_large = len(sizes) == 1 and (k := sizes.pop()) >= LARGE_KERNEL and k % 2 == 1
    return is_large and conv.groups == 1 and conv.in_channels <= STEM_CHANNELS


def is_depthwise(conv: ConvOperator) -> bool:
    return conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels


# Initial scaling factors: Hu et al. 2022, supplement Sec. 2.1.
OREPA = Block(
    "OREPA",
    {
        "origin": spatial_only(Kernel),
        "pointwise": spatial_only(Pointwise),
        "pointwise_kernel": spatial_only(PointwiseKernel),
        "average": spatial_only(AveragePool),
        "frequency": spatial_only(FrequencyFilter),
        "depthwise_pointwise": spatial_only(DepthwisePointwise),
    },
    {
        "origin": 0.25,
        "pointwise": 1.0,
        "pointwise_kernel": 0.5,
        "average": 0.5,
        "frequency": 0.0,
        "depthwise_pointwise": 0.5,
    },
)

# Two convs 1x1 - 1x1 beside the 1x1 itself: Hu et al. 2022, Sec. 3.5.
OREPA_1X1 = Block(
    "OREPA_1X1",
    {"origin": pointwise_only(Kernel), "pointwise_pointwise": pointwise_only(PointwisePointwise)},
    {"origin": 1.0, "pointwise_pointwise": 0.5},
)

DEEP_STEM = Block("DEEP_STEM", {"deep_stem": large_only(DeepStem)}, {"deep_stem": 1.0})

# The dense branch of the authors' RepVGG block: OREPA without the 1 x 1, which stands beside it and
# has a norm of its own (Hu et al. 2022, supplement Sec. 2.4 and Fig. 5). Their average branch
# starts at 0.25; the paper has 0.5.
OREPA_3X3_REPVGG = Block(
    "OREPA_3X3_REPVGG",
    {name: make for name, make in OREPA.branches.items() if name != "pointwise"},
    {**OREPA.scaling, "average": 0.25},
)

# Ding et al. 2021 (RepVGG).
REPVGG = Block(
    "REPVGG",
    {
        "origin": spatial_only(Kernel),
        "pointwise": spatial_only(Pointwise),
        "identity": spatial_only(same_size_only(Identity)),
    },
    {},
    "norm",
)

# For residual-free nets: the three branches of RepVGG stay on feature maps, each with its norm, and
# the k x k one is squeezed from OREPA's (Hu et al. 2022, supplement Sec. 2.4 and Fig. 5).
OREPA_VGG = Block(
    "OREPA_VGG",
    {**REPVGG.branches, "origin": spatial_only(lambda conv: BranchSum(conv, OREPA_3X3_REPVGG))},
    {},
    "norm",
)


def _has_narrow_groups(conv: ConvOperator) -> bool:
    return conv.groups == conv.out_channels > 1


def _pointwise(conv: ConvOperator) -> nn.Module | None:
    return None if _has_narrow_groups(conv) else Pointwise(conv)


def _pointwise_kernel(conv: ConvOperator) -> nn.Module:
    return PointwiseKernel(conv, copies=2 if _has_narrow_groups(conv) else 1)


def _average(conv: ConvOperator) -> nn.Module:
    return DepthwiseAverage(conv) if is_depthwise(conv) else AveragePool(conv)


# Ding et al. 2021 (DBB), Fig. 2. The factors are for replace(DBB, scaling_layer="vector").
DBB = Block(
    "DBB",
    {
        "origin": spatial_only(Kernel),
        "pointwise": spatial_only(_pointwise),
        "pointwise_kernel": spatial_only(_pointwise_kernel),
        "average": spatial_only(_average),
    },
    {name: OREPA.scaling[name] for name in ("origin", "pointwise", "pointwise_kernel", "average")},
    "norm",
)


def _line(axis: int) -> BranchMaker:
    """Makes a branch of the kernel's middle line along an axis, counted from the last."""

    def make(conv: ConvOperator) -> nn.Module | None:
        if conv.rank < -axis:
            return None
        size = [1] * conv.rank
        size[axis] = conv.kernel_size[axis]
        return InnerKernel(conv, tuple(size)) if 1 < prod(size) < prod(conv.kernel_size) else None

    return make


# Ding et al. 2019 (ACNet): k x k, k x 1, 1 x k; for volumes a third line.
ACNET = Block(
    "ACNET",
    {
        "origin": spatial_only(Kernel),
        "vertical": _line(-2),
        "horizontal": _line(-1),
        "deep": _line(-3),
    },
    {},
    "norm",
)

# Guo et al. 2020 (ExpandNets) and Cao et al. 2020 (DO-Conv) are online as they were published.
EXPAND_NET = Block("EXPAND_NET", {"expanded": spatial_only(Expanded)}, {}, "none")

DO_CONV = Block("DO_CONV", {"origin": spatial_only(OverParameterized)}, {}, "none")


def mobileone(repeats: int) -> Block:
    """Makes the block of MobileOne with this many k x k branches (Vasu et al. 2023, Fig. 3).

        model = orepa.expand(model, block=mobileone(4))

    Beside them stand a 1 x 1 branch and an identity, where the shape allows one.
    """
    again = {f"kernel_{number}": Kernel for number in range(2, repeats + 1)}
    branches = {
        "origin": Kernel,
        **again,
        "pointwise": spatial_only(Pointwise),
        "identity": same_size_only(Identity),
    }
    return Block(f"MOBILEONE_{repeats}", branches, {}, "norm")


# MobileOne-S0 has four, the larger ones have one.
MOBILEONE = mobileone(4)


def _dilated(size: int, rate: int) -> BranchMaker:
    def make(conv: ConvOperator) -> nn.Module | None:
        sizes = set(conv.kernel_size)
        named = DILATED_KERNELS.get(min(sizes), ()) if len(sizes) == 1 else ()
        if not is_depthwise(conv) or (size, rate) not in named:
            return None
        return InnerKernel(conv, (size,) * conv.rank, rate=rate)

    return make


# Large depthwise kernels with smaller dilated ones beside them (DILATED_KERNELS).
DILATED = Block(
    "DILATED",
    {
        "origin": spatial_only(Kernel),
        **{
            f"kernel_{size}_rate_{rate}": _dilated(size, rate)
            for size, rate in sorted({pair for row in DILATED_KERNELS.values() for pair in row})
        },
    },
    {},
    "norm",
)

BLOCKS = {
    block.name: block
    for block in (
        *(OREPA, OREPA_1X1, DEEP_STEM, OREPA_3X3_REPVGG, OREPA_VGG),
        *(DBB, REPVGG, ACNET, EXPAND_NET, DO_CONV, MOBILEONE, DILATED),
    )
}

# The names that blocks have in Python where they are not their own.
_IN_PYTHON = {"MOBILEONE": MOBILEONE}


def named(name: str) -> Block | Literal["auto"]:
    """The block of that name in the catalogue or in Python, in either case; "auto" for that.

    Raises ReparamError, with the names, for any other.
    """
    known = {**BLOCKS, **_IN_PYTHON}
    if name.lower() == "auto":
        return "auto"
    if name.upper() not in known:
        raise ReparamError(f"choose one of auto, {', '.join(BLOCKS)}")
    return known[name.upper()]


def automatic_block(conv: ConvOperator, *, is_residual: bool = True) -> Block:
    """The block that fits the conv's kernel: 1 x 1, large stem, or k x k.

    is_residual: whether connections pass by the conv; without any, its block brings branches that
    stay explicit (Hu et al. 2022, Sec. 4.5).
    """
    if prod(conv.kernel_size) == 1:
        return OREPA_1X1
    if is_large_stem(conv):
        return DEEP_STEM
    return OREPA if is_residual else OREPA_VGG
