"""Branches whose kernel is normalized: what branch norms do, without their feature maps.

Squeezing asks only that a branch is linear in the features. Its kernel may be any function of its
parameters, so that of weight normalization (Salimans and Kingma 2016) or standardization.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import Block, BranchMaker

_EPS = 1e-6


class Normalized(nn.Module):
    """W' = (W - mean) / |W - mean| for each output channel, the mean left out unless centred."""

    def __init__(self, branch: nn.Module, *, centred: bool) -> None:
        super().__init__()
        self.branch, self.centred = branch, centred

    def operator(self) -> ConvOperator:
        inner: ConvOperator = self.branch.operator()  # type: ignore[operator]
        axes = tuple(range(1, inner.weight.dim()))
        weight = inner.weight
        if self.centred:
            weight = weight - weight.mean(axes, keepdim=True)
        norm = weight.square().sum(axes, keepdim=True).add(_EPS**2).sqrt()
        return replace(inner, weight=weight / norm)


def normalized(block: Block, *, centred: bool = False, but: Collection[str] = ()) -> Block:
    """The block with normalized branches, whose scaling layers start at 1."""
    rest = {name: factor for name, factor in block.scaling.items() if name in but}
    branches = {
        name: maker if name in but else _wrapped(maker, centred=centred)
        for name, maker in block.branches.items()
    }
    return replace(block, branches=branches, scaling=rest)


def _wrapped(maker: BranchMaker, *, centred: bool) -> BranchMaker:
    def make(conv: ConvOperator) -> nn.Module | None:
        branch = maker(conv)
        return None if branch is None else Normalized(branch, centred=centred)

    return make
