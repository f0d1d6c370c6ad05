"""OREPA written straight from the paper's formulas: one einsum for each branch, under autograd."""

from __future__ import annotations

from functools import reduce
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orepa_compiler.blocks import BranchSum, ReparamConv
from orepa_compiler.blocks.catalogue import DeepStem
from orepa_compiler.branches import (
    AveragePool,
    DepthwisePointwise,
    FrequencyFilter,
    Kernel,
    Pointwise,
    PointwiseKernel,
    PointwisePointwise,
)


class NaiveConv(nn.Module):
    """A block's parameters, its kernel by the formulas, one conv."""

    def __init__(self, block: ReparamConv) -> None:
        super().__init__()
        self.block = block

    def kernel(self) -> Tensor:
        """W_e, as this form makes it at each step."""
        return block_kernel(self.block)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block.spatial(self.kernel(), self.block.groups).with_bias(self.block.bias)(x)
        return y if self.block.norm is None else self.block.norm(y)


def naive(model: nn.Module) -> nn.Module:
    """The expanded model with its blocks in this form, in place."""
    for name, child in list(model.named_children()):
        if isinstance(child, ReparamConv):
            setattr(model, name, NaiveConv(child))
        else:
            naive(child)
    return model


def block_kernel(block: BranchSum) -> Tensor:
    """sum_m diag(v_m) W_m."""
    kernels = [branch_kernel(branch) for branch in block.branches.values()]
    if block.scaling is not None:
        ones = (1,) * len(block.kernel_size)
        kernels = [v.reshape(-1, 1, *ones) * w for v, w in zip(block.scaling, kernels, strict=True)]
    return reduce(torch.add, kernels)


def branch_kernel(branch: nn.Module) -> Tensor:
    """The kernel of one of the paper's branches in two dimensions (Fig. 6 and Sec. 3.5)."""
    if isinstance(branch, Kernel):
        return branch.weight
    if isinstance(branch, Pointwise):
        return _centred(branch.weight, branch.kernel_size)
    if isinstance(branch, AveragePool):
        taps = branch.weight.new_full(branch.kernel_size, 1 / prod(branch.kernel_size))
        return torch.einsum("oi,hw->oihw", branch.weight.flatten(1), taps)
    if isinstance(branch, FrequencyFilter):
        return torch.einsum("oi,ohw->oihw", branch.weight.flatten(1), branch.prior[:, 0])
    if isinstance(branch, PointwiseKernel):
        width = branch.pointwise.shape[1]
        eye = torch.eye(width).to(branch.pointwise).repeat(branch.pointwise.shape[0] // width, 1)
        return _contracted(branch.kernel, branch.pointwise.flatten(1) + eye, branch.groups)
    if isinstance(branch, PointwisePointwise):
        return _contracted(branch.second, branch.first.flatten(1), branch.groups)
    if isinstance(branch, DepthwisePointwise):
        return _separable(branch)
    assert isinstance(branch, DeepStem)
    return reduce(_convolved, [block_kernel(layer) for layer in branch.stack])  # type: ignore[arg-type]


def _centred(weight: Tensor, kernel_size: tuple[int, ...]) -> Tensor:
    pads = [((size - 1) // 2, size - 1 - (size - 1) // 2) for size in reversed(kernel_size)]
    return F.pad(weight, [end for pair in pads for end in pair])


def _contracted(outer: Tensor, inner: Tensor, groups: int) -> Tensor:
    split = torch.einsum(
        "gothw,gti->goihw", outer.unflatten(0, (groups, -1)), inner.unflatten(0, (groups, -1))
    )
    return split.flatten(0, 1)


def _separable(branch: DepthwisePointwise) -> Tensor:
    channels, groups = branch.in_channels, branch.groups
    depthwise = branch.depthwise.reshape(groups, channels // groups, -1, *branch.kernel_size)
    pointwise = branch.pointwise.reshape(groups, -1, *depthwise.shape[1:3])
    return torch.einsum("goij,gijhw->goihw", pointwise, depthwise).flatten(0, 1)


def _convolved(inner: Tensor, outer: Tensor) -> Tensor:
    """The kernel of the second conv after the first (supplement Eq. 2)."""
    pads = [size - 1 for size in outer.shape[2:]]
    return F.conv2d(inner.transpose(0, 1), outer.flip(2, 3), padding=pads).transpose(0, 1)
