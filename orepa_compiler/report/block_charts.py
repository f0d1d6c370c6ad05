"""Draws the branches of a model in training form, as the paper does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.training.branch_history import BlockSnapshot, branch_snapshots


@dataclass(frozen=True)
class BlockBranches:
    """One block. channel_norms: for each branch |v_m W_m|_1 of every output channel, largest first.

    They are relative to the block's largest (Hu et al. 2022, S Fig. 3).
    """

    snapshot: BlockSnapshot
    channel_norms: tuple[tuple[float, ...], ...]


@torch.no_grad()
def block_branches(model: nn.Module) -> tuple[BlockBranches, ...]:
    """The branches of every block; none where the model has no block, or is sharded."""
    try:
        snapshots = branch_snapshots(model)
    except ReparamError:
        return ()
    return tuple(
        BlockBranches(snapshot, _channel_norms(model.get_submodule(snapshot.path)))
        for snapshot in snapshots
    )


def _channel_norms(block: Any) -> tuple[tuple[float, ...], ...]:
    operators = block.branch_operators().values()
    norms = [operator.weight.abs().flatten(1).sum(1).float() for operator in operators]
    largest = max(float(norm.max()) for norm in norms) or 1.0
    return tuple(tuple((norm.sort(descending=True).values / largest).tolist()) for norm in norms)
