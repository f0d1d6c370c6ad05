"""What a block starts from: the conv's present kernel, or the paper's from-scratch recipe."""

from __future__ import annotations

import copy
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.blocks import BranchSum, DeepStem, LinearBlock
from orepa_compiler.branches import Kernel

# Branches beside the origin start at this part of the paper's scaling, so that the origin, which
# takes the remainder, stays as large as the kernel it stands for.
REDUCTION = 0.1
# The remainder is rounded once; feeding the rounding of the sum back leaves one ulp.
_CORRECTIONS = 1
_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def preserve(block: LinearBlock, conv: _ConvNd) -> float:
    """Start the block at the conv's kernel, exactly; returns |origin| / |W|.

    v_m = REDUCTION * v_m(paper) * min(1, |W| / |v_m W_m|) for the branches beside the origin,
    v_origin = 1, and W_origin = W - sum_m v_m W_m. The bound keeps small pretrained kernels from
    being drowned by branches of a fresh kernel's size.
    """
    weight = conv.weight.detach()
    sizes = {name: op.weight.norm() for name, op in block.branch_operators().items()}
    for name, branch in block.branches.items():
        if name != "origin":
            bound = (weight.norm() / sizes[name].clamp_min(_TINY)).clamp(max=1.0)
            _reduce(block, name, branch, REDUCTION * bound)
    if block.scaling is not None:
        block.scaling[_index(block, "origin")] = 1.0
    origin = block.branches["origin"]
    assert isinstance(origin, Kernel)
    exact = copy.deepcopy(block).double().branch_operators()
    others = reduce(add, [operator for name, operator in exact.items() if name != "origin"])
    origin.weight.copy_(weight.double() - others.weight)
    for _ in range(_CORRECTIONS):
        origin.weight.add_(weight - block.operator().weight)
    return float(origin.weight.norm() / weight.norm().clamp_min(_TINY))


def _reduce(block: LinearBlock, name: str, branch: nn.Module, factor: Tensor) -> None:
    """Scale a branch down, in its scaling layer, or in its kernel where there is none."""
    if block.scaling is not None:
        block.scaling[_index(block, name)] *= factor
    else:
        shrink(branch, factor)


def shrink(branch: nn.Module, factor: Tensor) -> None:
    """Multiply the kernel of a branch by a factor, through the last of its layers."""
    if isinstance(branch, DeepStem):
        shrink(branch.stack[-1], factor)
    elif isinstance(branch, BranchSum):
        for inner in branch.branches.values():
            shrink(inner, factor)
    else:
        list(branch.parameters())[-1].mul_(factor)


def _index(block: BranchSum, name: str) -> int:
    return list(block.branches).index(name)
