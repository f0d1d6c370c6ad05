"""Expand: a conv gains branches. Each conv is given a block, or a reason why it is left alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.blocks import (
    BLOCKS,
    Block,
    LinearBlock,
    automatic_block,
    spatial_only,
)
from orepa_compiler.branches import Kernel
from orepa_compiler.capture import LAZY, Capture
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.following import ACTIVATION, NORM, followed_by, reads_pooled
from orepa_compiler.initialization import preserve
from orepa_compiler.layers import conv_operator, is_conv_like, own_forward_reason
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.rewrite import set_module
from orepa_compiler.selection import Where, selection

Init = Literal["preserve", "paper"]
PostNorm = Literal["auto", "none"]

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Expand:
    """Gives each eligible conv a block (Hu et al. 2022, Sec. 3.5 and Fig. 6).

    block: a Block, or "auto" to choose by kernel size. init: start at the conv's present kernel,
    or with the paper's from-scratch recipe. where: which convs; what it names is expanded even
    where it would be left alone by default. post_norm: insert a BatchNorm where no norm follows
    ("auto"), or never ("none").
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
        edits, refusals = [], []
        for path, module in capture.skeleton.named_modules():
            if not is_conv_like(module):
                continue
            if not is_selected(path, module):
                refusals.append(self._refusal(path, module, "excluded by where="))
                continue
            outcome = self._decide(capture, path, module)
            if isinstance(outcome, str):
                refusals.append(self._refusal(path, module, outcome))
            else:
                edits.append(outcome)
        return Plan(tuple(edits), tuple(refusals))

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        """The model with the planned blocks in place; the plan says how well each kernel is kept."""
        done = []
        for edit in plan.edits:
            conv = model.get_submodule(edit.path)
            try:
                block, ratio = self._build(conv, edit)
            except NotLinear as error:
                raise ReparamError(error.reason, path=edit.path) from error
            model = set_module(model, edit.path, block)
            note = f"|origin| / |W| = {ratio:.2f}" if ratio is not None else ""
            done.append(replace(edit, note="; ".join(filter(None, (edit.note, note)))))
        return model, Plan(tuple(done), plan.refusals)

    def _refusal(self, path: str, module: nn.Module, reason: str) -> Refusal:
        return Refusal(self.name, path, describe(module), reason)

    def _decide(self, capture: Capture, path: str, conv: nn.Module) -> Edit | str:
        reason = _unsound(capture, path, conv)
        if reason:
            return reason
        assert isinstance(conv, _ConvNd)
        follows = followed_by(capture, path)
        if self.where is None and (reason := _left_alone(capture, path, conv, follows)):
            return reason
        needs_norm = follows != NORM and self.post_norm == "auto"
        block = self._block(conv)
        branches = block.make(conv_operator(conv))
        if len(branches) < 2:
            return f"block {block.name} has no branch beside the kernel of a {describe(conv)}"
        return self._edit(path, conv, block, needs_norm=needs_norm)

    def _edit(self, path: str, conv: _ConvNd, block: Block, *, needs_norm: bool) -> Edit:
        new = LinearBlock(conv, block, norm=_post_norm(conv) if needs_norm else None)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (conv, new))
        note = "a BatchNorm is inserted: no norm follows" if needs_norm else ""
        options = {
            "block": block.name,
            "branches": list(new.branches),
            "scaling": block.scaling_layer,
            "norm": needs_norm,
            "init": self.init,
        }
        what = f"{block.name}: {' + '.join(new.branches)}"
        return Edit(self.name, path, describe(conv), what, (before, after), None, note, options)

    def _block(self, conv: _ConvNd) -> Block:
        operator = conv_operator(conv)
        block = automatic_block(operator) if self.block == "auto" else self.block
        return with_origin(block) if self.init == "preserve" else block

    def _build(self, conv: nn.Module, edit: Edit) -> tuple[LinearBlock, float | None]:
        if reason := own_forward_reason(conv):
            raise ReparamError(f"the plan does not fit this model: {reason}", path=edit.path)
        assert isinstance(conv, _ConvNd)
        options = edit.options
        block = _named_block(options["block"], self.block)
        block = replace(block, scaling_layer=options["scaling"])
        block = with_origin(block) if options["init"] == "preserve" else block
        norm = _post_norm(conv) if options["norm"] else None
        new = LinearBlock(conv, block, norm=norm)
        if list(new.branches) != options["branches"]:
            raise ReparamError(
                f"the plan asks for the branches {options['branches']}, "
                f"block {block.name} gives {list(new.branches)}",
                path=edit.path,
            )
        has_values = not conv.weight.is_meta
        ratio = preserve(new, conv) if options["init"] == "preserve" and has_values else None
        new.requires_grad_(conv.weight.requires_grad)
        return new, ratio


def with_origin(block: Block) -> Block:
    """The block with a branch that can hold any kernel, so that a given one can be preserved."""
    if "origin" in block.branches:
        return block
    return replace(block, branches={"origin": spatial_only(Kernel), **block.branches})


def describe(module: nn.Module) -> str:
    """A conv in a few words: Conv2d 64 -> 128 3x3 /2."""
    if not isinstance(module, _ConvNd):
        return type(module).__name__
    parts = [f"{type(module).__name__} {module.in_channels} -> {module.out_channels}"]
    parts.append("x".join(map(str, module.kernel_size)))
    if set(module.stride) != {1}:
        parts.append("/" + "x".join(map(str, dict.fromkeys(module.stride))))
    if module.groups > 1:
        parts.append(f"groups {module.groups}")
    if set(module.dilation) != {1}:
        parts.append("dilation " + "x".join(map(str, dict.fromkeys(module.dilation))))
    return " ".join(parts)


def _unsound(capture: Capture, path: str, conv: nn.Module) -> str | None:
    """Why a block in the place of this conv could change what the model computes."""
    if any(isinstance(p, LAZY) for p in conv.parameters()):
        return "its shape is not known yet (lazy); run the model once first"
    if getattr(conv, "transposed", False):
        return f"{type(conv).__name__} is transposed; blocks are for plain convs"
    return own_forward_reason(conv) or capture.refusal(path)


def _left_alone(capture: Capture, path: str, conv: _ConvNd, follows: str) -> str | None:
    """Why a block would not pay or not train here; where= overrides it."""
    ask = "; ask for it with where="
    if reads_pooled(capture, path):
        return "on maps pooled to one pixel its kernel costs more to make than to apply" + ask
    if conv.kernel_size == conv.stride and prod(conv.kernel_size) > 1:
        return "a patch embedding (kernel = stride)" + ask
    if follows not in (NORM, ACTIVATION):
        return f"no norm follows: {follows}" + ask
    return None


def _named_block(name: str, block: Block | Literal["auto"]) -> Block:
    known = dict(BLOCKS) if block == "auto" else {**BLOCKS, block.name: block}
    if name not in known:
        raise ReparamError(
            f"the plan asks for block {name!r}, which is none of {', '.join(known)}; "
            "give yours with block="
        )
    return known[name]


def _post_norm(conv: _ConvNd) -> nn.Module:
    """A BatchNorm that is the identity in eval mode until it is calibrated or trained."""
    norm = _NORMS[len(conv.kernel_size)](
        conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype
    )
    nn.init.constant_(norm.weight, (1 + norm.eps) ** 0.5)
    if conv.bias is not None and not conv.bias.is_meta:
        # in train mode a norm takes the conv's bias away: it lives on as the norm's own
        with torch.no_grad():
            norm.bias.copy_(conv.bias)
    return norm
