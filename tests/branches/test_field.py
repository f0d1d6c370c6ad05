"""Each branch of the other blocks against its published formula, written out in loops."""

from __future__ import annotations

from itertools import product
from math import cos, pi, prod

import pytest
import torch
from torch import Tensor

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.branches import FrequencyFilter, PointwiseKernel, SequenceBranch
from orepa_compiler.branches.field import (
    DCTFilter,
    DepthwiseAverage,
    Expanded,
    InnerKernel,
    OverParameterized,
    dct_bank,
)
from tests.branches.test_branches import GEOMETRIES, SIZES, randomise, spread_groups
from tests.convolution_reference import assert_same, dense, reference
from tests.operator_factories import conv, random_tensor

EVERY_GEOMETRY = pytest.mark.parametrize("op", GEOMETRIES.values(), ids=GEOMETRIES)
LARGE: dict[str, ConvOperator] = {
    "7x7": conv(7, 7, channels=(4, 6), padding=3),
    "7x7 stride 2": conv(7, 7, channels=(4, 4), padding=3, stride=2, groups=4),
    "7x7 dilated": conv(7, 7, channels=(2, 2), padding=6, dilation=2, groups=2),
    "7x7 unpadded": conv(7, 7, channels=(2, 3)),
    "9x7 circular": conv(9, 7, channels=(2, 3), padding=[4, 3], mode="circular"),
    "7 in 1d": conv(7, channels=(2, 3), padding=3),
}


def formula(branch: SequenceBranch, op: ConvOperator) -> Tensor:
    """The kernel of a branch without groups, (C_out, C_in, *K)."""
    kernel = torch.zeros(op.out_channels, op.in_channels, *op.kernel_size, dtype=torch.float64)
    if isinstance(branch, Expanded):
        matrices = [spread_groups(w, op.groups).flatten(1) for w in (branch.first, branch.last)]
        middle = spread_groups(branch.kernel, op.groups)
        return torch.einsum("ap,pq...,qb->ab...", matrices[1], middle, matrices[0])
    if isinstance(branch, OverParameterized):
        weight = dense(ConvOperator(branch.weight, groups=op.groups)).flatten(2)
        for i in range(op.in_channels):
            for s, tap in enumerate(product(*map(range, op.kernel_size))):
                moved = branch.depthwise[i, s].clone()
                moved[tap] += 1
                kernel[:, i] += weight[:, i, s].reshape(-1, *(1,) * op.rank) * moved
        return kernel
    assert isinstance(branch, FrequencyFilter)
    point = spread_groups(branch.weight, op.groups).flatten(1)
    for tap in product(*map(range, op.kernel_size)):
        for o in range(op.out_channels):
            kernel[(o, slice(None), *tap)] = point[o] * wave(o, tap, op)
    return kernel


def wave(c: int, tap: tuple[int, ...], op: ConvOperator) -> float:
    """FcaNet Eq. 2: frequency pairs by their sum, without the constant one, shared evenly."""
    pairs = [p for p in product(*map(range, op.kernel_size)) if any(p)]
    ordered = sorted(pairs, key=lambda pair: (sum(pair), pair))
    frequencies = ordered[c * len(ordered) // op.out_channels]
    return prod(
        cos(u * (t + 0.5) * pi / k)
        for u, t, k in zip(frequencies, tap, op.kernel_size, strict=True)
    )


@EVERY_GEOMETRY
@pytest.mark.parametrize("cls", [Expanded, OverParameterized, DCTFilter])
def test_operator_is_the_formula(cls: type[SequenceBranch], op: ConvOperator) -> None:
    branch = cls(op)
    randomise(branch)
    whole = (op.stride, op.padding, op.dilation, 1, op.padding_mode)
    with torch.no_grad():
        expected = ConvOperator(formula(branch, op), None, *whole)
        x = random_tensor(2, op.in_channels, *SIZES[op.rank])
        assert_same(reference(branch.operator(), x), reference(expected, x))
        assert_same(branch(x), reference(expected, x))


@pytest.mark.parametrize("rate", [1, 2, 3])
@pytest.mark.parametrize("op", LARGE.values(), ids=LARGE)
def test_an_inner_kernel_lies_in_the_middle(op: ConvOperator, rate: int) -> None:
    branch = InnerKernel(op, (3,) * op.rank, rate=rate)
    expected = torch.zeros_like(op.weight)
    for tap in product(range(3), repeat=op.rank):
        place = tuple(k // 2 + rate * (t - 1) for t, k in zip(tap, op.kernel_size, strict=True))
        expected[(..., *place)] = branch.weight.detach()[(..., *tap)]
    x = random_tensor(2, op.in_channels, *(17,) * op.rank)
    with torch.no_grad():
        whole = op.with_bias(None) + branch.operator()
        assert (whole.kernel_size, whole.padding) == (op.kernel_size, op.padding)
        assert_same(whole.weight - op.weight, expected)
        one = ConvOperator(
            expected, None, op.stride, op.padding, op.dilation, op.groups, op.padding_mode
        )
        assert_same(branch(x), reference(one, x))


@pytest.mark.parametrize("name", ["3x3", "2x4 even", "3x5 stride 2x1", "1d", "3d", "circular"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_a_line_of_the_kernel(name: str, axis: int) -> None:
    op = GEOMETRIES[name]
    if op.rank < -axis:
        pytest.skip("a line along an axis that is not there")
    size = [1] * op.rank
    size[axis] = op.kernel_size[axis]
    branch = InnerKernel(op, tuple(size))
    change = ((op + branch.operator()).weight - op.weight).abs().sum((0, 1)) > 1e-9
    places = [[(k - 1) // 2] for k in op.kernel_size]
    places[axis] = list(range(op.kernel_size[axis]))
    assert [tuple(p) for p in change.nonzero().tolist()] == list(product(*places))


def test_depthwise_average() -> None:
    op = conv(3, 5, channels=(4, 4), groups=4, padding=[1, 2], stride=2)
    branch, x = DepthwiseAverage(op), random_tensor(2, 4, 9, 10)
    pool = torch.nn.AvgPool2d((3, 5), 2, (1, 2))
    assert_same(branch(x), pool(x))
    assert_same(reference(branch.operator(), x), pool(x))
    assert not list(branch.parameters())


@pytest.mark.parametrize("op", [GEOMETRIES["3x3"], GEOMETRIES["groups 2"]], ids=["1", "2"])
def test_over_parameterized_starts_at_its_weight(op: ConvOperator) -> None:
    """DO-Conv, Sec. 3.3: D is the identity at first, so W' = W; and no D_mul is wasted."""
    branch = OverParameterized(op)
    assert branch.weight.shape == op.weight.shape
    assert branch.depthwise.shape == (4, 9, 3, 3)
    assert torch.equal(branch.depthwise, torch.zeros_like(branch.depthwise))
    assert_same(branch.operator().weight, branch.weight)


def test_expanded_is_four_times_as_wide() -> None:
    branch = Expanded(conv(3, 3, channels=(4, 6), groups=2))
    shapes = [tuple(p.shape) for p in branch.parameters()]
    assert shapes == [(16, 2, 1, 1), (24, 8, 3, 3), (6, 12, 1, 1)]


def test_pointwise_kernel_with_copies() -> None:
    assert PointwiseKernel(conv(3, 3, channels=(4, 6)), copies=3).pointwise.shape[0] == 12
    assert PointwiseKernel(conv(3, 3, channels=(8, 8), groups=8), copies=1).pointwise.shape[0] == 8


def test_no_filter_of_the_cosine_bank_is_empty_and_the_papers_sixth_is() -> None:
    """In the paper's bank cos((c + 1)(h + 0.5) pi / 3) is zero on all taps for c + 1 = 3, 9."""
    bank = dct_bank(64, (3, 3)).flatten(1)
    assert float(bank.norm(dim=1).min()) > 1
    assert len(bank.round(decimals=9).unique(dim=0)) == 8
    assert bank.sum(1).abs().max() < 1e-12, "a wave has no mean"
    paper = FrequencyFilter(conv(3, 3, channels=(4, 72))).prior.flatten(1)
    assert int((paper.norm(dim=1) < 1e-12).sum()) == 72 / 6
    assert dct_bank(4, (1, 1)).unique().tolist() == [1.0]


@pytest.mark.parametrize("cls", [Expanded, OverParameterized, DCTFilter, DepthwiseAverage])
def test_a_fresh_branch_has_the_dtype_of_the_conv(cls: type[SequenceBranch]) -> None:
    for dtype in (torch.float32, torch.float64):
        branch = cls(conv(3, 3).to(dtype))
        assert {tensor.dtype for tensor in branch.state_dict().values()} == {dtype}
