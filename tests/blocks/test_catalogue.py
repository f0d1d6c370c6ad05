"""The published blocks: which branches they give a conv, and their online forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import Block, BranchSum, LinearBlock, squeezed
from orepa_compiler.blocks.catalogue import (
    ACNET,
    BLOCKS,
    DBB,
    DILATED,
    DILATED_KERNELS,
    DO_CONV,
    EXPAND_NET,
    OREPA,
    OREPA_VGG,
    REPVGG,
    automatic_block,
    mobileone,
)
from orepa_compiler.branches import AveragePool, PointwiseKernel
from orepa_compiler.branches.field import DCTFilter, DepthwiseAverage, InnerKernel
from tests.convolution_reference import assert_same, reference
from tests.operator_factories import conv, random_tensor

DENSE = conv(3, 3, channels=(4, 4), padding=1)
WIDER = conv(3, 3, channels=(4, 6), padding=1)
STRIDED = conv(3, 3, channels=(4, 4), padding=1, stride=2)
DEPTHWISE = conv(3, 3, channels=(4, 4), padding=1, groups=4)
POINT = conv(1, 1, channels=(4, 4))
SEVEN = conv(7, 7, channels=(4, 4), padding=3, groups=4)
LINE = conv(3, channels=(4, 4), padding=1)
VOLUME = conv(3, 3, 3, channels=(2, 2), padding=1)

GIVEN: list[tuple[Block, ConvOperator, str]] = [
    (REPVGG, DENSE, "origin pointwise identity"),
    (REPVGG, WIDER, "origin pointwise"),
    (REPVGG, STRIDED, "origin pointwise"),
    (REPVGG, DEPTHWISE, "origin pointwise identity"),
    (REPVGG, POINT, ""),
    (OREPA_VGG, DENSE, "origin pointwise identity"),
    (OREPA_VGG, STRIDED, "origin pointwise"),
    (OREPA_VGG, POINT, ""),
    (DBB, DENSE, "origin pointwise pointwise_kernel average"),
    (DBB, DEPTHWISE, "origin pointwise_kernel average"),
    (DBB, conv(3, 3, channels=(4, 1)), "origin pointwise pointwise_kernel average"),
    (DBB, POINT, ""),
    (ACNET, DENSE, "origin vertical horizontal"),
    (ACNET, conv(1, 5), "origin"),
    (ACNET, LINE, "origin"),
    (ACNET, VOLUME, "origin vertical horizontal deep"),
    (EXPAND_NET, DENSE, "expanded"),
    (EXPAND_NET, POINT, ""),
    (DO_CONV, DEPTHWISE, "origin"),
    (DO_CONV, POINT, ""),
    (mobileone(3), DENSE, "origin kernel_2 kernel_3 pointwise identity"),
    (mobileone(1), STRIDED, "origin pointwise"),
    (mobileone(2), POINT, "origin kernel_2 identity"),
    (DILATED, SEVEN, "origin kernel_3_rate_2 kernel_3_rate_3 kernel_5_rate_1"),
    (DILATED, conv(7, 7, channels=(4, 4), padding=3), "origin"),
    (DILATED, DEPTHWISE, "origin"),
    (DILATED, conv(7, 5, channels=(4, 4), groups=4), "origin"),
]


@pytest.mark.parametrize(("block", "op", "names"), GIVEN)
def test_the_branches_that_a_block_gives(block: Block, op: ConvOperator, names: str) -> None:
    assert list(block.make(op)) == names.split()


def test_every_block_is_exported_and_found_by_its_name() -> None:
    exported = {value.name for value in vars(orepa.public).values() if isinstance(value, Block)}
    assert exported == BLOCKS.keys() - {"OREPA_3X3_REPVGG"}
    assert all(BLOCKS[name].name == name for name in BLOCKS)
    assert orepa.mobileone(2).name == "MOBILEONE_2"
    assert orepa.DCTFilter is DCTFilter


def test_the_dense_branch_of_orepa_vgg_has_no_one_by_one() -> None:
    dense: Any = OREPA_VGG.make(DENSE)["origin"]
    assert isinstance(dense, BranchSum)
    assert set(dense.branches) == OREPA.branches.keys() - {"pointwise"}
    assert dense.scaling is not None


def test_dbb_of_a_depthwise_conv_is_wider_inside_and_pools_alone() -> None:
    dense, depthwise = DBB.make(DENSE), DBB.make(DEPTHWISE)
    inside = []
    for made in (dense, depthwise):
        branch = made["pointwise_kernel"]
        assert isinstance(branch, PointwiseKernel)
        inside.append(branch.pointwise.shape[0])
    assert inside == [4, 8]
    assert isinstance(dense["average"], AveragePool)
    assert isinstance(depthwise["average"], DepthwiseAverage)


@pytest.mark.parametrize("size", DILATED_KERNELS)
def test_dilated_kernels_fit_into_the_large_one(size: int) -> None:
    op = conv(size, size, channels=(2, 2), padding=size // 2, groups=2)
    made = DILATED.make(op)
    assert len(made) == 1 + len(DILATED_KERNELS[size])
    for branch in list(made.values())[1:]:
        assert isinstance(branch, InnerKernel)
        assert (op + branch.operator()).kernel_size == (size, size)


@pytest.mark.parametrize(
    ("op", "name"), [(DENSE, "OREPA_VGG"), (POINT, "OREPA_1X1"), (LINE, "OREPA_VGG")]
)
def test_automatic_block_of_a_residual_free_net(op: ConvOperator, name: str) -> None:
    assert automatic_block(op, is_residual=False).name == name
    stem = conv(7, 7, channels=(3, 8), padding=3, stride=2)
    assert automatic_block(stem, is_residual=False).name == "DEEP_STEM"


ONLINE = {
    "EXPAND_NET": EXPAND_NET,
    "DO_CONV": DO_CONV,
    "RepVGG-Online": replace(REPVGG, scaling_layer="vector"),
    "DBB online": replace(DBB, scaling_layer="vector"),
    "ACNet online": replace(ACNET, scaling_layer="scalar"),
    "MobileOne online": replace(mobileone(2), scaling_layer="vector"),
    "dilated online": replace(DILATED, scaling_layer="vector"),
    "DCT": replace(OREPA, branches={**OREPA.branches, "frequency": DCTFilter}),
}
CONVS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "3x3 groups, stride 2": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2),
    "depthwise 7x7": lambda: nn.Conv2d(4, 4, 7, padding=3, groups=4),
    "1d": lambda: nn.Conv1d(4, 4, 3, padding=1),
}


@pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("block", ONLINE.values(), ids=ONLINE)
def test_the_online_form_has_the_values_and_gradients_of_its_feature_maps(
    block: Block, make: Callable[[], nn.Module]
) -> None:
    layer: Any = make().double()
    made = LinearBlock(layer, block)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.add_(0.3 * random_tensor(*parameter.shape, seed=number))
    one = squeezed(copy.deepcopy(made))
    size = (11, 12)[: len(layer.kernel_size)]
    x = random_tensor(2, 4, *size)
    for module in (made, one):
        y = module(x)
        (y * random_tensor(*y.shape, seed=9)).sum().backward()
    with torch.no_grad():
        assert_same(one(x), made(x))
        assert_same(reference(conv_operator(one), x), made(x))
    for (name, ours), theirs in zip(one.named_parameters(), made.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        scale = max(float(theirs.grad.abs().max()), 1e-3)
        assert float((ours.grad - theirs.grad).abs().max()) <= 1e-12 * scale, name


@pytest.mark.parametrize("block", [EXPAND_NET, DO_CONV], ids=lambda b: b.name)
def test_a_kernel_is_made_without_a_larger_one(block: Block) -> None:
    """What exists between is at most the branch's own parameters, not a dense depthwise kernel."""
    layer = nn.Conv2d(32, 32, 3, padding=1)
    made = LinearBlock(layer, block)
    largest = max(p.numel() for p in made.parameters())
    sizes: list[int] = []
    with Sizes(sizes):
        made.operator()
    assert max(sizes) <= max(largest, 9 * layer.weight.numel())


class Sizes(torch.overrides.TorchFunctionMode):
    """Notes how many elements each tensor has that a function gives."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.sizes.append(made.numel())
        return made
