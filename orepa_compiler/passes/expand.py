"""Expand: a conv gains branches. Each conv is given a block, or a reason why it is left alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.layers import (
    computes_kernel,
    conv_operator,
    is_channels_last,
    is_conv_like,
    kernel_operator,
    own_forward_reason,
)
from orepa_compiler.analysis.eligibility import (
    describe,
    left_alone_reason,
    no_conv_reason,
    no_norms_reason,
    scripted_reason,
    takes_norm,
    unsound_reason,
)
from orepa_compiler.analysis.following import NORM, followed_by
from orepa_compiler.analysis.residual import is_summed, residual_reason
from orepa_compiler.blocks import LINEARIZED, Block, LinearBlock, inserted_norm
from orepa_compiler.blocks.catalogue import BLOCKS, OREPA_VGG, automatic_block
from orepa_compiler.blocks.initialization import extend, preserve, with_origin
from orepa_compiler.blocks.offline import OfflineBlock, features_cost
from orepa_compiler.blocks.own_forward import OwnForwardConv
from orepa_compiler.branches import Kernel
from orepa_compiler.capture import Capture
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.rewrite import set_module_everywhere
from orepa_compiler.selection import Where, is_asked_for, selection

Init = Literal["preserve", "paper"]
PostNorm = Literal["auto", "none"]


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
            module = model.get_submodule(edit.path)
            try:
                if edit.options.get("extends"):
                    ratio = self._extend(module, edit)
                else:
                    if reason := unsound_reason(capture, edit.path, capture.module(edit.path)):
                        message = f"the plan does not fit this model: {reason}"
                        raise ReparamError(message, path=edit.path)
                    block, ratio = self._build(module, edit)
                    model = set_module_everywhere(model, capture.aliases[edit.path], block)
            except NotLinear as error:
                raise ReparamError(error.reason, path=edit.path) from error
            note = f"|origin| / |W| = {ratio:.2f}" if ratio is not None else ""
            done.append(replace(edit, note="; ".join(filter(None, (edit.note, note)))))
        return model, Plan(tuple(done), plan.refusals)

    def _refusal(self, path: str, module: nn.Module, reason: str) -> Refusal:
        return Refusal(self.name, path, describe(module), reason)

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
            return f"block {block.name} has no branch beside the kernel of a {describe(conv)}"
        is_offline = block.scaling_layer == "norm"
        if is_offline and (reason := no_norms_reason(capture, path, conv)):
            return reason
        wants_norm = self.post_norm == "auto" and follows != NORM and not is_offline
        needs_norm = wants_norm and takes_norm(capture, path)
        return self._edit(path, conv, block, needs_norm=needs_norm)

    def _edit(self, path: str, conv: _ConvNd, block: Block, *, needs_norm: bool) -> Edit:
        new = _block_for(conv, block, needs_norm=needs_norm)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (conv, new))
        notes = ["a BatchNorm is inserted: no norm follows"] if needs_norm else []
        if new.block_name == OREPA_VGG.name and self.block == "auto":
            notes.append("residual-free net")
        if isinstance(new, OwnForwardConv):
            notes.append(f"the kernel goes into the forward of {type(conv).__name__}")
        options = {
            "block": block.name,
            "branches": list(new.branches),
            "scaling": block.scaling_layer,
            "norm": needs_norm,
            "init": self.init,
        }
        if isinstance(new, OfflineBlock):
            options["cost"] = features_cost(new)
        what = f"{block.name}, {len(new.branches)} branches"
        note = "; ".join(notes)
        return Edit(self.name, path, describe(conv), what, (before, after), None, note, options)

    def _may_grow(self, block: LinearBlock) -> bool:
        """Whether a block may gain branches: a linearized one, or where more are asked for."""
        is_linear = block.scaling_layer != "norm"
        return is_linear and (block.block_name == LINEARIZED or self.block != "auto")

    def _extension(self, path: str, block: LinearBlock) -> list[Edit]:
        """The branches that a block lacks."""
        new = self._missing(block, self._kind(block))
        if not new:
            return []
        before = sum(p.numel() for p in block.parameters())
        row = 0 if block.scaling is None else block.scaling.shape[1]
        grown = sum(row + sum(p.numel() for p in branch.parameters()) for branch in new.values())
        name = self._kind(block).name
        options = {"extends": True, "block": name, "branches": list(new), "init": self.init}
        what = f"linear block: {' + '.join(block.branches)}"
        target = f"{name}: and {' + '.join(new)}"
        sizes = (before, before + grown)
        return [Edit(self.name, path, what, target, sizes, None, "", options)]

    def _kind(self, block: LinearBlock) -> Block:
        """The kind of block that a linearized one becomes."""
        return automatic_block(block.operator()) if self.block == "auto" else self.block

    def _missing(self, block: LinearBlock, wanted: Block) -> dict[str, nn.Module]:
        made = wanted.make(block.operator()) if "origin" in block.branches else {}
        return {name: branch for name, branch in made.items() if name not in block.branches}

    def _extend(self, module: nn.Module, edit: Edit) -> float | None:
        if not isinstance(module, LinearBlock):
            raise ReparamError("the plan extends a linear block, here is none", path=edit.path)
        block = _named_block(edit.options["block"], self.block)
        weight = module.weight.detach().clone()
        new = self._missing(module, block)
        is_frozen = not any(p.requires_grad for p in module.parameters())
        extend(module, new, dict(block.scaling))
        if is_frozen:
            module.requires_grad_(False)
        has_values = not weight.is_meta
        keep = edit.options["init"] == "preserve" and has_values
        return preserve(module, weight, new) if keep else None

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

    def _build(self, conv: nn.Module, edit: Edit) -> tuple[LinearBlock, float | None]:
        assert isinstance(conv, _ConvNd)
        options = edit.options
        block = _named_block(options["block"], self.block)
        block = replace(block, scaling_layer=options["scaling"])
        block = with_origin(block) if options["init"] == "preserve" else block
        new = _block_for(conv, block, needs_norm=options["norm"])
        if list(new.branches) != options["branches"]:
            raise ReparamError(
                f"the plan asks for the branches {options['branches']}, "
                f"block {block.name} gives {list(new.branches)}",
                path=edit.path,
            )
        keep = options["init"] == "preserve" and not conv.weight.is_meta
        fresh = [name for name in new.branches if name != "origin"]
        ratio = preserve(new, conv.weight, fresh) if keep else None
        if is_channels_last(conv.weight):
            new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        new.requires_grad_(conv.weight.requires_grad)
        if conv.bias is not None:
            bias = new.bias if new.norm is None else new.norm.bias
            assert isinstance(bias, nn.Parameter)
            bias.requires_grad_(conv.bias.requires_grad)
        return new, ratio


def _block_for(conv: _ConvNd, block: Block, *, needs_norm: bool) -> LinearBlock:
    """The block for a conv: on features, to be squeezed, or with the conv's own forward."""
    if block.scaling_layer == "norm":
        return OfflineBlock(conv, block)
    if own_forward_reason(conv) is not None:
        return OwnForwardConv(conv, block)
    return LinearBlock(conv, block, norm=_post_norm(conv) if needs_norm else None)


def _named_block(name: str, block: Block | Literal["auto"]) -> Block:
    known = dict(BLOCKS) if block == "auto" else {**BLOCKS, block.name: block}
    if name not in known:
        raise ReparamError(
            f"the plan asks for block {name!r}, which is none of {', '.join(known)}; "
            "give yours with block="
        )
    return known[name]


def _post_norm(conv: _ConvNd) -> nn.Module:
    """The inserted norm; the conv's bias, without effect before a norm, becomes the norm's own."""
    norm = inserted_norm(conv_operator(conv), conv.weight)
    if conv.bias is not None and not conv.bias.is_meta:
        with torch.no_grad():
            norm.bias.copy_(conv.bias)
    return norm
