"""What a block starts from: exactly the conv's kernel, whatever its size and the scaling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import Block, BranchSum, LinearBlock, Scaling
from orepa_compiler.blocks.catalogue import DEEP_STEM, OREPA, OREPA_1X1
from orepa_compiler.blocks.initialization import REDUCTION, extend, preserve, shrink, with_origin
from orepa_compiler.branches import Identity, Kernel, Pointwise
from tests.operator_factories import conv

SCALINGS: tuple[Scaling, ...] = ("vector", "scalar", "none")
# The remainder is rounded once to the origin, and the sum of the branches once more: of 600 kernels
# the worst came to 1.9 ulps of the largest element. Twice that, for other CPUs.
ULPS = 4
BLOCKS = {
    "3x3": (OREPA, conv(3, 3, channels=(8, 12), padding=1)),
    "3x3 stride 2": (OREPA, conv(3, 3, channels=(8, 12), padding=1, stride=2)),
    "groups": (OREPA, conv(3, 3, channels=(16, 8), padding=1, groups=8)),
    "depthwise": (OREPA, conv(5, 5, channels=(6, 6), padding=2, groups=6)),
    "2x4": (OREPA, conv(2, 4, channels=(4, 6), dilation=2)),
    "1d": (OREPA, conv(3, channels=(4, 6))),
    "3d": (OREPA, conv(3, 3, 3, channels=(2, 4))),
    "1x1": (OREPA_1X1, conv(1, 1, channels=(8, 12))),
    "deep stem": (with_origin(DEEP_STEM), conv(7, 7, channels=(3, 8), stride=2, padding=3)),
}
EVERY_BLOCK = pytest.mark.parametrize(("block", "op"), BLOCKS.values(), ids=BLOCKS)
EVERY_SCALING = pytest.mark.parametrize("scaling", SCALINGS)


def started(
    block: Block, op: ConvOperator, weight: Tensor, scaling: Scaling = "vector"
) -> tuple[BranchSum, float]:
    made = BranchSum(op.to(weight.dtype), replace(block, scaling_layer=scaling))
    ratio = preserve(made, weight, [name for name in made.branches if name != "origin"])
    return made, ratio


def rounding(made: BranchSum, weight: Tensor) -> float:
    """The error of the composed kernel, in units of the last place of the largest tap."""
    kernel = made.operator()
    assert kernel.kernel_size == weight.shape[2:]
    ulp = torch.finfo(weight.dtype).eps * weight.abs().max()
    return float(((kernel.weight - weight).abs().max() / ulp).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EVERY_SCALING
@EVERY_BLOCK
def test_preserve_starts_at_the_kernel(
    block: Block, op: ConvOperator, scaling: Scaling, dtype: torch.dtype
) -> None:
    weight = op.weight.to(dtype)
    made, ratio = started(block, op, weight, scaling)
    assert rounding(made, weight) <= ULPS
    assert 0.4 < ratio < 1.6
    for name, branch in made.branches.items():
        assert name in ("origin", "frequency") or branch.operator().weight.abs().max() > 0


@EVERY_BLOCK
def test_float64_is_exact_to_1e_15(block: Block, op: ConvOperator) -> None:
    made, _ = started(block, op, op.weight)
    assert (made.operator().weight - op.weight).abs().max() <= 1e-15 * op.weight.abs().max()


@EVERY_SCALING
@EVERY_BLOCK
def test_zero_weights_stay_zero(block: Block, op: ConvOperator, scaling: Scaling) -> None:
    weight = torch.zeros_like(op.weight)
    made, ratio = started(block, op, weight, scaling)
    assert made.operator().weight.abs().max() == 0
    assert ratio == 0


@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e3])
@EVERY_SCALING
@EVERY_BLOCK
def test_the_origin_stays_as_large_as_the_kernel(
    block: Block, op: ConvOperator, scaling: Scaling, norm: float
) -> None:
    weight = (op.weight * (norm / op.weight.norm())).float()
    made, ratio = started(block, op, weight, scaling)
    origin = made.branches["origin"].weight.detach().norm() / weight.norm()
    assert ratio == pytest.approx(float(origin), rel=1e-5)
    assert 0.4 < ratio < 1.6
    assert rounding(made, weight) <= ULPS


def test_scaling_is_the_papers_reduced_and_the_origins_one() -> None:
    op = conv(3, 3, channels=(8, 12))
    weight = 1e3 * op.weight
    made, _ = started(OREPA, op, weight)
    assert made.scaling is not None
    expected = {name: REDUCTION * factor for name, factor in OREPA.scaling.items()}
    expected["origin"] = 1.0
    for name, row in zip(made.branches, made.scaling, strict=True):
        assert row.tolist() == pytest.approx([expected[name]] * 12), name


def test_the_weight_given_is_left_alone_and_trains_nothing() -> None:
    op = conv(3, 3, channels=(4, 6))
    weight = nn.Parameter(op.weight.clone())
    made, _ = started(OREPA, op, weight)
    assert torch.equal(weight, op.weight)
    made.operator().weight.sum().backward()
    assert weight.grad is None
    assert made.branches["origin"].weight.grad is not None


@EVERY_SCALING
def test_extend_and_preserve_keep_the_kernel(scaling: Scaling) -> None:
    op = conv(3, 3, channels=(4, 6), padding=1)
    first = Block("FIRST", {"origin": Kernel, "pointwise": Pointwise}, {"pointwise": 0.3}, scaling)
    made = BranchSum(op, first)
    before = made.operator().weight.detach().clone()
    new = {n: b for n, b in OREPA.make(op).items() if n not in made.branches}
    extend(made, new, dict(OREPA.scaling))
    assert list(made.branches) == ["origin", "pointwise", *new]
    if made.scaling is not None:
        assert made.scaling.shape == (6, 6 if scaling == "vector" else 1)
        factors = [1.0, 0.3, *(OREPA.scaling[name] for name in new)]
        assert made.scaling[:, 0].tolist() == pytest.approx(factors)
        assert made.scaling.requires_grad
    assert (made.operator().weight - before).abs().max() > 1e-3, "extend alone must change it"
    preserve(made, before, new)
    assert rounding(made, before) <= ULPS
    if made.scaling is not None:
        assert made.scaling[1].tolist() == pytest.approx([0.3] * made.scaling.shape[1])


def test_extend_without_a_factor_starts_at_one() -> None:
    op = conv(3, 3)
    made = BranchSum(op, Block("FIRST", {"origin": Kernel}, {"origin": 0.5}))
    extend(made, {"again": Kernel(op)}, {})
    assert made.scaling is not None
    assert made.scaling[:, 0].tolist() == [0.5, 1.0]


@EVERY_BLOCK
def test_shrink_multiplies_the_kernel(block: Block, op: ConvOperator) -> None:
    for branch in block.make(op).values():
        before = branch.operator().weight.detach().clone()
        with torch.no_grad():
            shrink(branch, torch.tensor(0.25, dtype=op.weight.dtype))
        change = (branch.operator().weight - 0.25 * before).abs().max()
        assert change <= 1e-14 * before.abs().max()


@EVERY_SCALING
def test_a_branch_without_parameters_is_no_obstacle(scaling: Scaling) -> None:
    op = conv(3, 3, channels=(6, 6), padding=1)
    block = Block("RESIDUAL", {"origin": Kernel, "identity": Identity}, {}, scaling)
    made, _ = started(block, op, op.weight, scaling)
    assert rounding(made, op.weight) <= ULPS


def test_a_block_keeps_the_function_of_its_conv() -> None:
    layer = nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode="circular")
    made = LinearBlock(layer, OREPA)
    preserve(made, layer.weight, [name for name in made.branches if name != "origin"])
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-6)
