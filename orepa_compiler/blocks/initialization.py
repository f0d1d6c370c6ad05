"""Starts a block from the conv's present kernel, or by the paper's from-scratch recipe."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import Block, BranchSum
from orepa_compiler.blocks.catalogue import DeepStem
from orepa_compiler.blocks.offline import OfflineBranch
from orepa_compiler.branches import Kernel
from orepa_compiler.branches.field import OverParameterized
from orepa_compiler.errors import ReparamError

# Branches beside the origin start at this part of the paper's scaling, so that the origin, which
# takes the remainder, stays as large as the kernel it stands for.
REDUCTION = 0.1
_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def preserve(block: BranchSum, weight: Tensor, fresh: Collection[str]) -> float:
    """Start the block at the kernel `weight`, up to its rounding; returns |origin| / |W|.

    v_m = REDUCTION * v_m(paper) * min(1, |W| / |v_m W_m|) for the fresh branches, v_origin = 1, and
    W_origin = W - sum_m v_m W_m. The bound keeps small pretrained kernels from being drowned by
    branches of a fresh kernel's size.
    """
    weight = weight.detach()
    origin = block.branches["origin"]
    others = _exact(origin).scale(weight.new_zeros(1).double())
    for name, branch in block.branches.items():  # one at a time: in float64 each is large
        if name == "origin":
            continue
        operator = _exact(branch)
        if name in fresh:
            size = _scaled(block, name, operator).weight.norm().to(weight)
            bound = (weight.norm() / size.clamp_min(_TINY)).clamp(max=1.0)
            _reduce(block, name, REDUCTION * bound)
            if block.scaling is None:  # its kernel changed, and was rounded
                operator = _exact(branch)
        others = others + _scaled(block, name, operator)
    if block.scaling is not None:
        block.scaling[_index(block, "origin")] = 1.0
    remainder = weight.double() - others.weight
    hold(origin, remainder)
    return float(remainder.norm() / weight.norm().clamp_min(_TINY))


def with_origin(block: Block) -> Block:
    """The block with a branch that can hold any kernel, so that a given one can be preserved."""
    given = block.branches.get("origin", Kernel)

    def origin(conv: ConvOperator) -> nn.Module:
        branch = given(conv)
        if branch is not None and not holds_any_kernel(branch):
            raise ReparamError(
                f"the origin of block {block.name} is a {type(branch).__name__}, which cannot be "
                "set to any kernel; make it a Kernel, or use init='paper'"
            )
        return Kernel(conv) if branch is None else branch

    rest = {name: maker for name, maker in block.branches.items() if name != "origin"}
    return replace(block, branches={"origin": origin, **rest})


def holds_any_kernel(branch: nn.Module) -> bool:
    """Whether a fresh branch can be set to any kernel of its conv, as an origin must be."""
    if isinstance(branch, BranchSum):
        return "origin" in branch.branches and holds_any_kernel(branch.branches["origin"])
    return isinstance(branch, (Kernel, OverParameterized))


@torch.no_grad()
def hold(branch: nn.Module, kernel: Tensor) -> None:
    """Sets a fresh branch to a kernel, (C_out, C_in / groups, *K): its norms are the identity yet.

    A sum of branches gives it to its own origin.
    """
    if isinstance(branch, OfflineBranch):
        hold(branch.branch, kernel)
    elif isinstance(branch, BranchSum):
        preserve(branch, kernel, [name for name in branch.branches if name != "origin"])
    else:
        assert isinstance(branch, (Kernel, OverParameterized))
        branch.weight.copy_(kernel)


def _exact(branch: nn.Module) -> ConvOperator:
    """The operator of a branch, composed in float64."""
    operator: ConvOperator = copy.deepcopy(branch).double().operator()  # type: ignore[operator]
    return operator


def _scaled(block: BranchSum, name: str, operator: ConvOperator) -> ConvOperator:
    """The operator behind the branch's scaling layer, as that is now."""
    if block.scaling is None:
        return operator
    return operator.scale(block.scaling[_index(block, name)].double())


@torch.no_grad()
def extend(block: BranchSum, branches: dict[str, nn.Module], scaling: dict[str, float]) -> None:
    """Adds branches to a block that has some, each with its initial scaling factor."""
    for name, branch in branches.items():
        block.branches[name] = branch
    if block.scaling is not None:
        factors = block.scaling.new_tensor([scaling.get(name, 1.0) for name in branches])
        rows = factors.unsqueeze(1).expand(-1, block.scaling.shape[1])
        block.scaling = nn.Parameter(torch.cat([block.scaling, rows]))


def _reduce(block: BranchSum, name: str, factor: Tensor) -> None:
    """Scale a branch down, in its scaling layer, or in its kernel where there is none."""
    if block.scaling is not None:
        block.scaling[_index(block, name)] *= factor
    else:
        shrink(block.branches[name], factor)


def shrink(branch: nn.Module, factor: Tensor) -> None:
    """Multiply the kernel of a branch by a factor, through the last of its layers.

    A branch without parameters is fixed, and stays as it is.
    """
    if isinstance(branch, OfflineBranch):
        branch.norms[-1].weight.mul_(factor)  # type: ignore[operator]
    elif isinstance(branch, DeepStem):
        shrink(branch.stack[-1], factor)
    elif isinstance(branch, BranchSum):
        for inner in branch.branches.values():
            shrink(inner, factor)
    elif parameters := list(branch.parameters()):
        parameters[-1].mul_(factor)


def _index(block: BranchSum, name: str) -> int:
    return list(block.branches).index(name)
