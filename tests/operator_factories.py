"""Random operators over a grid of geometries, and what the tests of the algebra ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.errors import NotLinear

MODES = ("zeros", "reflect", "replicate", "circular")

Pair = tuple[int, int]


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 values, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv(
    *kernel: int,
    channels: Pair = (4, 4),
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | Pair] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = True,
    mode: str = "zeros",
    seed: int = 0,
) -> ConvOperator:
    """A random operator, (in, out) channels; with no kernel sizes a linear layer.

    stride, padding, dilation: one number for all axes or one per axis; a padding may be a pair.
    """
    rank, (width, out) = len(kernel), channels
    pads = [padding] * rank if isinstance(padding, int) else padding
    return ConvOperator(
        random_tensor(out, width // groups, *kernel, seed=seed),
        random_tensor(out, seed=seed + 1000) if bias else None,
        (stride,) * rank if isinstance(stride, int) else tuple(stride),
        tuple((p, p) if isinstance(p, int) else p for p in pads),
        (dilation,) * rank if isinstance(dilation, int) else tuple(dilation),
        groups,
        mode,
    )


@st.composite
def operators(
    draw: st.DrawFn, rank: int, channels: tuple[int, int], *, padded: bool = True
) -> ConvOperator:
    """Any operator of this rank and these (in, out) channels; unpadded ones may still crop."""
    axes = range(rank)
    crop, pad = [(0, 0), (0, 0), (-1, -2), (-1, 0)], [(1, 1), (0, 1), (3, -1), (-1, 2)]
    pads = st.sampled_from(crop + pad if padded else crop)
    groups = [g for g in (1, 2, 3, 4, 6) if not any(c % g for c in channels)]
    return conv(
        *(draw(st.integers(1, 4)) for _ in axes),
        channels=channels,
        stride=[draw(st.sampled_from([1, 1, 2, 3])) for _ in axes],
        padding=[draw(pads) for _ in axes],
        dilation=[draw(st.integers(1, 3)) for _ in axes],
        groups=draw(st.sampled_from(groups)),
        bias=draw(st.booleans()),
        mode=draw(st.sampled_from(MODES)),
        seed=draw(st.integers(0, 999)),
    )


def beside(
    op: ConvOperator,
    kernel: int,
    *,
    dilation: int = 1,
    shift: int = 0,
    longer: int = 0,
    mode: str | None = None,
    groups: int = 1,
    seed: int = 200,
) -> ConvOperator:
    """A random operator that reads the same input and gives an output of the same size.

    shift: how many pixels further to the left it starts. longer: by how many pixels of input it
    reaches further, before the stride.
    """
    extent = dilation * (kernel - 1) + 1
    pads = [
        (before + shift, longer + after - shift + extent - spanned)
        for (before, after), spanned in zip(op.padding, op.extent, strict=True)
    ]
    return conv(
        *(kernel,) * op.rank,
        channels=(op.in_channels, op.out_channels),
        stride=op.stride,
        padding=pads,
        dilation=dilation,
        groups=groups,
        mode=op.padding_mode if mode is None else mode,
        seed=seed,
    )


def image(rank: int, size: int, *, channels: int = 4, seed: int = 99) -> Tensor:
    """A batch of 2 whose axes have the sizes size, size + 2, ..."""
    return random_tensor(2, channels, *(size + 2 * axis for axis in range(rank)), seed=seed)


def roomy_image(op: ConvOperator, extra: int = 9) -> Tensor:
    """An input on which op gives some `extra` pixels before its stride, and its padding fits."""
    wanted = [n - sum(p) for n, p in zip(op.extent, op.padding, strict=True)]
    room = max(*wanted, *(max(p) for p in op.padding))
    return image(op.rank, room + extra, channels=op.in_channels)


def images(op: ConvOperator) -> list[Tensor]:
    """Inputs of several sizes, so that every remainder of a stride is met."""
    sizes = {0: range(1), 1: range(36, 42), 2: range(11, 14), 3: range(8, 10)}[op.rank]
    return [image(op.rank, size, channels=op.in_channels) for size in sizes]


def naive(outer: ConvOperator, inner: ConvOperator, mode: str) -> ConvOperator:
    """outer @ inner as it would be if no border were ever in the way, in this padding mode."""
    nothing = ((0, 0),) * outer.rank
    composed = replace(outer, padding=nothing) @ replace(inner, padding=nothing)
    padding = tuple(
        (first[0] + stride * second[0], first[1] + stride * second[1])
        for first, second, stride in zip(inner.padding, outer.padding, inner.stride, strict=True)
    )
    return replace(composed, padding=padding, padding_mode=mode)


def interior(op: ConvOperator, x: Tensor, y: Tensor) -> Tensor:
    """The part of y = op(x) that reads no padding."""
    for axis, stride in enumerate(op.stride):
        before = op.padding[axis][0]
        first = -(-max(before, 0) // stride)
        last = (x.shape[2 + axis] + before - op.extent[axis]) // stride
        y = y.narrow(2 + axis, first, min(last + 1, y.shape[2 + axis]) - first)
    return y


def attempt(outer: ConvOperator, inner: ConvOperator) -> ConvOperator | None:
    """outer @ inner, or None where it is refused."""
    try:
        return outer @ inner
    except NotLinear:
        return None


def structure(op: ConvOperator) -> tuple[object, ...]:
    """All of an operator but its values."""
    bias = None if op.bias is None else op.bias.shape
    rest = (op.stride, op.padding, op.dilation, op.groups, op.padding_mode)
    return (op.weight.shape, bias, *rest)


ONE = torch.ones((), dtype=torch.float64)

GRID: dict[str, ConvOperator] = {
    "0d": conv(seed=1),
    "0d-groups2-nobias": conv(groups=2, bias=False, seed=2),
    "0d-identity": identity(4, 0, like=ONE),
    "1d-1": conv(1, seed=3),
    "1d-1-nobias": conv(1, bias=False, seed=4),
    "1d-1-s2-nobias": conv(1, stride=2, bias=False, seed=5),
    "1d-1-p1": conv(1, padding=1, seed=6),
    "1d-1-p1-nobias": conv(1, padding=1, bias=False, seed=7),
    "1d-identity": identity(4, 1, like=ONE),
    "1d-2-same": conv(2, padding=[(0, 1)], seed=8),
    "1d-2-s2-nobias": conv(2, stride=2, bias=False, groups=2, seed=9),
    "1d-3": conv(3, seed=10),
    "1d-3-p1": conv(3, padding=1, seed=11),
    "1d-3-p1-nobias": conv(3, padding=1, bias=False, seed=12),
    "1d-3-s2-p1": conv(3, stride=2, padding=1, seed=13),
    "1d-3-d2-p2-depthwise": conv(3, padding=2, dilation=2, groups=4, seed=14),
    "1d-3-crop": conv(3, padding=[(-1, -1)], seed=15),
    "1d-3-shift": conv(3, padding=[(3, -1)], bias=False, seed=16),
    "1d-4-s2-p1": conv(4, stride=2, padding=1, seed=17),
    "1d-4-d3-s3": conv(4, stride=3, padding=[(2, 5)], dilation=3, seed=18),
    "1d-5-ahead": conv(5, padding=[(0, 4)], groups=2, seed=19),
    "1d-3-p2-reflect": conv(3, padding=2, mode="reflect", seed=20),
    "1d-1-s2-replicate": conv(1, stride=2, mode="replicate", seed=21),
    "1d-3-p1-replicate": conv(3, padding=1, mode="replicate", seed=22),
    "1d-2-behind-replicate": conv(2, padding=[(1, 0)], mode="replicate", bias=False, seed=23),
    "1d-3-p1-circular": conv(3, padding=1, mode="circular", seed=24),
    "1d-4-shift-circular": conv(4, padding=[(4, -1)], mode="circular", seed=25),
    "1d-3-s2-p1-circular": conv(3, stride=2, padding=1, mode="circular", seed=26),
    "2d-1": conv(1, 1, seed=27),
    "2d-1-nobias": conv(1, 1, bias=False, groups=2, seed=28),
    "2d-1-s2-nobias": conv(1, 1, stride=2, bias=False, seed=29),
    "2d-3-p1": conv(3, 3, padding=1, seed=30),
    "2d-3-depthwise": conv(3, 3, groups=4, bias=False, seed=31),
    "2d-3x1-p1": conv(3, 1, padding=[1, 0], seed=32),
    "2d-1x3-p1-nobias": conv(1, 3, padding=[0, 1], bias=False, seed=33),
    "2d-4x2-same": conv(4, 2, padding=[(1, 2), (0, 1)], seed=34),
    "2d-3x2-s2x1-d1x2": conv(3, 2, stride=[2, 1], padding=[1, (1, -1)], dilation=[1, 2], seed=35),
    "2d-3-p1-reflect": conv(3, 3, padding=1, mode="reflect", seed=36),
    "2d-3x1-p1-circular": conv(3, 1, padding=[1, 0], mode="circular", seed=37),
    "2d-2x3-circular": conv(2, 3, padding=[(0, 1), 1], mode="circular", groups=2, seed=38),
    "3d-1": conv(1, 1, 1, bias=False, seed=39),
    "3d-3-p1": conv(3, 3, 3, padding=1, groups=2, seed=40),
    "3d-1x2x3": conv(1, 2, 3, stride=[1, 2, 1], padding=[0, (0, 1), -1], seed=41),
    "3d-2-d2-replicate": conv(2, 2, 2, padding=1, dilation=2, mode="replicate", seed=42),
    "3d-3-p1-circular": conv(3, 3, 1, padding=[1, 1, 0], mode="circular", groups=4, seed=43),
}

# Refused, and yet exact for every input size: outer -> [inner]. No rule is worth its length here.
REFUSED_THOUGH_EXACT: dict[str, list[str]] = {
    # What the first conv gives beyond the border is all padding, and so the zeros it should be.
    **{
        name: ["1d-1-p1-nobias"]
        for name, op in GRID.items()
        if op.rank == 1 and op.has_padding and op.padding_mode == "zeros"
    },
    "1d-3-shift": ["1d-1-p1-nobias", "1d-2-s2-nobias", "1d-3-shift"],
    # The first conv gives a border of padding alone, and the second one's padding repeats it.
    "1d-3-p1-replicate": ["1d-1-p1", "1d-1-p1-nobias"],
    "1d-3-p1-circular": ["1d-1-p1", "1d-1-p1-nobias"],
    "1d-3-s2-p1-circular": ["1d-1-p1", "1d-1-p1-nobias"],
    "1d-2-behind-replicate": [
        "1d-1-p1",
        "1d-1-p1-nobias",
        "1d-3-shift",
        # Padding on the left alone repeats the first pixel, where every stride starts.
        "1d-1-s2-nobias",
        "1d-1-s2-replicate",
        "1d-2-behind-replicate",
    ],
}

EVERY = pytest.mark.parametrize("op", GRID.values(), ids=GRID)
NAMES = pytest.mark.parametrize("name", GRID)
