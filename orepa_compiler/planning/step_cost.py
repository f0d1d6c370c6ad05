"""Predicts what blocks add to a training step: the arithmetic of their kernels.

The making of a kernel costs the same for one image as for a thousand, so it counts most where a
batch is small and feature maps are too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import BranchSum, ConvBlock
from orepa_compiler.blocks.offline import OfflineBlock, OfflineBranch, features_cost
from orepa_compiler.branches import SequenceBranch
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import Edit, Plan, Refusal

# A product's two gradients are two more of its size: of a conv, and of two kernels of a branch.
_PRODUCTS = 3


@torch.no_grad()
def kernel_macs(block: BranchSum) -> int:
    """Multiply-accumulates of making a block's kernel once, without gradients.

    Of a branch that is a sequence, its compositions; of each, its place in the sum. A branch of
    another kind counts as the kernel that it gives.
    """
    return sum(_branch_macs(branch) for branch in block.branches.values())


def _branch_macs(branch: nn.Module) -> int:
    if isinstance(branch, OfflineBranch):  # it runs on feature maps, but for a sum inside
        return kernel_macs(branch.branch) if isinstance(branch.branch, BranchSum) else 0
    inside = [module for module in branch.modules() if isinstance(module, BranchSum)]
    macs = sum(map(kernel_macs, inside))
    if not isinstance(branch, SequenceBranch):
        made: ConvOperator = branch.operator()  # type: ignore[operator]
        return macs + made.weight.numel()
    total, *others = branch.layers()
    for layer in others:
        macs += layer.weight.numel() * total.weight.shape[1:].numel()
        total = layer.after(total)
    return macs + total.weight.numel()


def with_step_costs(plan: Plan, expanded: nn.Module, images: int) -> Plan:
    """The plan, each block's note with what it adds to its conv's part of a training step.

    plan: with MACs. expanded: the model after it; values are not needed. images: in a batch. What
    is added stands in the edit's options too: "added", as multiply-accumulates of a step.
    """
    edits = []
    for edit in plan.edits:
        added = _added(edit, expanded, images)
        if added is None or edit.macs is None:
            edits.append(edit)
            continue
        ratio = added / (_PRODUCTS * edit.macs[0] * images)
        note = f"+{ratio:.0%} of its step"
        options = {**edit.options, "added": added, "images": images}
        edits.append(
            replace(edit, note="; ".join(filter(None, (edit.note, note))), options=options)
        )
    return Plan(tuple(edits), plan.refusals)


def _added(edit: Edit, expanded: nn.Module, images: int) -> int | None:
    """Multiply-accumulates of a step, forward and backward, beyond those of the conv."""
    if edit.done_by != "expand" or edit.macs is None:
        return None
    block = expanded.get_submodule(edit.path)
    assert isinstance(block, ConvBlock)
    features = 0.0
    if isinstance(block, OfflineBlock):
        features = max(features_cost(block) - 1, 0) * edit.macs[0] * images
    return round(_PRODUCTS * (kernel_macs(block) + features))


def step_cost(plan: Plan) -> float:
    """What all blocks of a plan with step costs add, over the step of the convs that it counts."""
    costs = [edit for edit in plan.edits if "added" in edit.options and edit.macs is not None]
    convs = sum(_PRODUCTS * edit.macs[0] * edit.options["images"] for edit in costs if edit.macs)
    return sum(edit.options["added"] for edit in costs) / convs if convs else 0.0


def affordable(plan: Plan, macs: Mapping[str, int], max_cost: float) -> Plan:
    """The plan without the blocks that add most, so that all together add max_cost at most.

    plan: with step costs. macs: of every conv of the model, for one image: what is added is
    compared with the step of all of them. The dearest block goes first. Raises ReparamError for a
    max_cost that is no ratio.
    """
    if not 0 <= max_cost < float("inf"):
        raise ReparamError(f"max_cost={max_cost!r} is no ratio: give 0.15 for 15 % of the convs")
    costs = [edit for edit in plan.edits if "added" in edit.options]
    if not costs:
        return plan
    images = costs[0].options["images"]
    convs, left = _PRODUCTS * images * sum(macs.values()), sum(e.options["added"] for e in costs)
    out: dict[str, Refusal] = {}
    for edit in sorted(costs, key=lambda own: own.options["added"], reverse=True):
        if left <= max_cost * convs or edit.options.get("extends"):
            continue
        reason = (
            f"with it the step is {left / convs:.1%} dearer at batch {images}, "
            f"more than max_cost={max_cost:g}; its block is the dearest of those left"
        )
        out[edit.path] = Refusal(edit.done_by, edit.path, edit.before, reason)
        left -= edit.options["added"]
    kept = tuple(edit for edit in plan.edits if not _belongs(edit, out))
    return Plan(kept, (*plan.refusals, *out.values()))


def _belongs(edit: Edit, paths: Mapping[str, Refusal]) -> bool:
    """Whether the edit makes one of these blocks, or squeezes it or what is inside it."""
    if edit.done_by not in ("expand", "squeeze"):
        return False
    return any(edit.path == path or edit.path.startswith(f"{path}.") for path in paths)
