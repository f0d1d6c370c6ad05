"""Expand: a conv gains branches. Each conv is given a block, or a reason why it is left alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.classifiers import computes_kernel, is_conv_like
from orepa_compiler.algebra.layers import kernel_operator
from orepa_compiler.blocks import LINEARIZED, Block, LinearBlock
from orepa_compiler.blocks.catalogue import OREPA_VGG, automatic_block
from orepa_compiler.blocks.initialization import with_origin
from orepa_compiler.blocks.offline import OfflineBlock, features_cost
from orepa_compiler.blocks.own_forward import OwnForwardConv
from orepa_compiler.branches import Kernel
from orepa_compiler.capture import Capture
from orepa_compiler.defaults.following import NORM, followed_by
from orepa_compiler.defaults.residual import is_summed, residual_reason
from orepa_compiler.defaults.worth import left_alone_reason
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.passes.expand.building import block_for, built, grow, missing, planned_block
from orepa_compiler.passes.expand.options import (
    Init as Init,
)
from orepa_compiler.passes.expand.options import (
    MoreBranches,
    NewBlock,
    growth_of,
    growth_options,
)
from orepa_compiler.passes.expand.options import (
    PostNorm as PostNorm,
)
from orepa_compiler.passes.expand.soundness import (
    no_conv_reason,
    no_norms_reason,
    scripted_reason,
    takes_norm,
    unsound_reason,
)
from orepa_compiler.passes.expand.wording import describe_conv
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.planning.overlaps import Touched
from orepa_compiler.rewriting.selection import Where, is_asked_for, selection
from orepa_compiler.rewriting.swapping import set_module_everywhere


@dataclass(frozen=True)
class Expand:
    """Gives each eligible conv a block (Hu et al. 2022, Sec. 3.5 and Fig. 6).

    block: a Block, or "auto" to choose by the kernel's size and by whether the net has residual
    connections. init: start at the conv's present kernel, or with the paper's from-scratch recipe.
    where: which convs; what it names (an exclusion alone names nothing) is expanded even where it
    would be left alone by default. post_norm: insert a BatchNorm where no norm follows ("auto"), or
    never ("none").
    """

    block: Block | Literal["auto"] = "auto"
    init: Init = "preserve"
    where: Where = None
    post_norm: PostNorm = "auto"
    name: str = "expand"
    training: bool = True

    @property
    def preserves(self) -> frozenset[str]:
        return frozenset({"eval"} if self.init == "preserve" else ())

    def plan(self, capture: Capture) -> Plan:
        """One edit or one refusal for every conv of the model."""
        is_selected = selection(self.where)
        chooses = self.block == "auto" and self.post_norm == "auto"
        is_residual = not chooses or residual_reason(capture) is not None
        edits, refusals = [], []
        for path, module in capture.skeleton.named_modules():
            if isinstance(module, LinearBlock) and self._may_grow(module):
                is_linearized = module.block_name == LINEARIZED  # it was asked for the owner
                places = (path, path.rpartition(".")[0]) if is_linearized else (path,)
                if any(is_selected(place, capture.module(place)) for place in places):
                    edits += self._extension(path, module)
            if computes_kernel(module):
                refusals.append(
                    Refusal(self.name, path, type(module).__name__, no_conv_reason(module))
                )
            if scripted := scripted_reason(capture, path, module):
                refusals.append(Refusal(self.name, path, "TorchScript", scripted))
            if not is_conv_like(module):
                continue
            if not is_selected(path, module):
                refusals.append(self._refusal(path, module, "excluded by where="))
                continue
            outcome = self._decide(capture, path, module, is_residual=is_residual)
            if isinstance(outcome, str):
                refusals.append(self._refusal(path, module, outcome))
            else:
                edits.append(outcome)
        return Plan(tuple(edits), tuple(refusals))

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        """The model with the planned blocks in place; notes say how large each origin became."""
        done = []
        for edit in plan.edits:
            module, growth = model.get_submodule(edit.path), growth_of(edit)
            block = planned_block(growth.block, self.block)
            try:
                if isinstance(growth, MoreBranches):
                    ratio = grow(module, growth, block, edit.path)
                else:
                    if reason := unsound_reason(capture, edit.path, capture.module(edit.path)):
                        message = f"the plan does not fit this model: {reason}"
                        raise ReparamError(message, path=edit.path)
                    new, ratio = built(module, growth, block, edit.path)
                    model = set_module_everywhere(model, capture.aliases[edit.path], new)
            except NotLinear as error:
                raise ReparamError(error.reason, path=edit.path) from error
            note = f"|origin| / |W| = {ratio:.2f}" if ratio is not None else ""
            done.append(replace(edit, note="; ".join(filter(None, (edit.note, note)))))
        return model, Plan(tuple(done), plan.refusals)

    def touched(self, edit: Edit) -> Touched:
        return Touched((edit.path,), stays=isinstance(growth_of(edit), MoreBranches))

    def _refusal(self, path: str, module: nn.Module, reason: str) -> Refusal:
        return Refusal(self.name, path, describe_conv(module), reason)

    def _decide(
        self, capture: Capture, path: str, conv: nn.Module, *, is_residual: bool
    ) -> Edit | str:
        reason = unsound_reason(capture, path, conv)
        if reason:
            return reason
        assert isinstance(conv, _ConvNd)
        follows = followed_by(capture, path)
        if not is_asked_for(self.where) and (
            reason := left_alone_reason(capture, path, conv, follows)
        ):
            return reason
        block = self._block(capture, path, conv, is_residual=is_residual)
        branches = block.make(kernel_operator(conv))
        if all(name == "origin" and isinstance(b, Kernel) for name, b in branches.items()):
            return f"block {block.name} has no branch beside the kernel of a {describe_conv(conv)}"
        is_offline = block.is_offline
        if is_offline and (reason := no_norms_reason(capture, path, conv)):
            return reason
        wants_norm = self.post_norm == "auto" and follows != NORM and not is_offline
        needs_norm = wants_norm and takes_norm(capture, path)
        return self._edit(path, conv, block, needs_norm=needs_norm)

    def _edit(self, path: str, conv: _ConvNd, block: Block, *, needs_norm: bool) -> Edit:
        new = block_for(conv, block, needs_norm=needs_norm)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (conv, new))
        notes = ["a BatchNorm is inserted: no norm follows"] if needs_norm else []
        if new.block_name == OREPA_VGG.name and self.block == "auto":
            notes.append("residual-free net")
        if isinstance(new, OwnForwardConv):
            notes.append(f"the kernel goes into the forward of {type(conv).__name__}")
        branches, scaling = tuple(new.branches), block.scaling_layer
        cost = features_cost(new) if isinstance(new, OfflineBlock) else None
        growth = NewBlock(block.name, branches, scaling, needs_norm, self.init, cost)
        what, sizes = f"{block.name}, {len(branches)} branches", (before, after)
        note, options = "; ".join(notes), growth_options(growth)
        return Edit(self.name, path, describe_conv(conv), what, sizes, None, note, options)

    def _may_grow(self, block: LinearBlock) -> bool:
        """Whether a block may gain branches: a linearized one, or where more are asked for."""
        return block.block_name == LINEARIZED or self.block != "auto"

    def _extension(self, path: str, block: LinearBlock) -> list[Edit]:
        """The branches that a block lacks."""
        kind = self._kind(block)
        new = missing(block, kind)
        if not new:
            return []
        before = sum(p.numel() for p in block.parameters())
        row = 0 if block.scaling is None else block.scaling.shape[1]
        grown = sum(row + sum(p.numel() for p in branch.parameters()) for branch in new.values())
        options = growth_options(MoreBranches(kind.name, tuple(new), self.init))
        what = f"linear block: {' + '.join(block.branches)}"
        target = f"{kind.name}: and {' + '.join(new)}"
        sizes = (before, before + grown)
        return [Edit(self.name, path, what, target, sizes, None, "", options)]

    def _kind(self, block: LinearBlock) -> Block:
        """The kind of block that a linearized one becomes."""
        return automatic_block(block.operator()) if self.block == "auto" else self.block

    def _block(self, capture: Capture, path: str, conv: _ConvNd, *, is_residual: bool) -> Block:
        if self.block != "auto":
            block = self.block
        else:
            has_company = is_residual or is_summed(capture, path)  # explicit branches beside it
            may_normalize = (
                conv.weight.requires_grad and no_norms_reason(capture, path, conv) is None
            )
            is_alone = may_normalize and not has_company
            block = automatic_block(kernel_operator(conv), is_residual=not is_alone)
        return with_origin(block) if self.init == "preserve" else block
