"""Cut: a block becomes a plain conv again, or loses some branches, in the middle of training.

What goes is added to the origin branch, so the function stays the same; norms stay, and the mode.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.blocks.parts import PartOfBlock
from orepa_compiler.blocks.plain import like, plain_conv
from orepa_compiler.branches.sequences import trained_kernel
from orepa_compiler.capture import Capture
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.planning.overlaps import Touched
from orepa_compiler.rewriting.selection import Where, selection
from orepa_compiler.rewriting.swapping import set_module_everywhere


@dataclass(frozen=True)
class Cut:
    """Takes branches out of blocks; branches: which, None for all.

    A block without branches is a plain conv. One with an inserted norm stays, as its origin and
    that norm.
    """

    where: Where = None
    branches: tuple[str, ...] | None = None
    name: str = "cut"
    training: bool | None = None
    preserves: frozenset[str] = frozenset({"train", "eval"})

    def plan(self, capture: Capture) -> Plan:
        is_selected = selection(self.where)
        edits, refusals = [], []
        for path, block in capture.skeleton.named_modules():
            if not isinstance(block, ConvBlock) or not is_selected(path, block):
                continue
            if reason := self._refusal(capture, path, block):
                refusals.append(Refusal(self.name, path, f"block {block.block_name}", reason))
            elif edit := self._edit(path, block):
                edits.append(edit)
        return Plan(tuple(edits), tuple(refusals))

    def touched(self, edit: Edit) -> Touched:
        return Touched((edit.path,))

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        for edit in plan.edits:
            block = model.get_submodule(edit.path)
            if not isinstance(block, ConvBlock):
                raise ReparamError("the plan cuts a block, here is none", path=edit.path)
            new = _cut(block, edit.option("branches"))
            model = set_module_everywhere(model, capture.aliases[edit.path], new)
        return model, plan

    def _refusal(self, capture: Capture, path: str, block: ConvBlock) -> str | None:
        if isinstance(block, OfflineBlock):
            return (
                "its branches end in norms, so in train mode no conv does what it does; "
                "linearize it, or collapse the model"
            )
        if self.branches is not None and "origin" not in block.branches:
            return "it has no origin branch to take the kernels of others; cut all of them"
        return capture.hook_refusal(path)

    def _edit(self, path: str, block: ConvBlock) -> Edit | None:
        names = self.branches
        if names is not None and not (names := tuple(n for n in block.branches if n in names)):
            return None
        before = sum(p.numel() for p in block.parameters())
        new = _cut(copy.deepcopy(block), names)
        after = sum(p.numel() for p in new.parameters())
        what = f"block {block.block_name}: {' + '.join(block.branches)}"
        target = " + ".join(new.branches) if isinstance(new, ConvBlock) else "plain conv"
        return Edit(self.name, path, what, target, (before, after), options={"branches": names})


@torch.no_grad()
def _cut(block: ConvBlock, names: Sequence[str] | None) -> nn.Module:
    """The block without these branches, or without all of them and their scaling layers (None).

    A block that stays one is changed itself.
    """
    if names is None and block.norm is None:
        return plain_conv(block)
    order = list(block.branches)
    taken = order if names is None else ["origin", *names]
    kept = {} if names is None else {n: b for n, b in block.branches.items() if n not in names}
    part = PartOfBlock(block, taken)
    kernel = block.spatial(copy.deepcopy(part).double()(), block.groups)
    origin = like(trained_kernel(kernel, trains=True), list(part.parameters()))
    scaling = block.scaling
    if names is None:
        block.scaling, block.scaling_layer = None, "none"
    elif scaling is not None:
        rows = scaling[[order.index(name) for name in kept]]
        rows[list(kept).index("origin")] = 1.0
        block.scaling = nn.Parameter(rows, requires_grad=scaling.requires_grad)
    block.branches = nn.ModuleDict({**kept, "origin": origin})
    return block.train(block.training)
