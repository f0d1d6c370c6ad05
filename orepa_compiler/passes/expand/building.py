"""Builds a block in the place of a conv, or gives a block the branches that it lacks."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.classifiers import is_channels_last, own_forward_reason
from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.blocks import Block, ConvBlock, LinearBlock, inserted_norm
from orepa_compiler.blocks.catalogue import BLOCKS
from orepa_compiler.blocks.initialization import extend, preserve, with_origin
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.blocks.own_forward import OwnForwardConv
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes.expand.options import MoreBranches, NewBlock


def built(
    conv: nn.Module, growth: NewBlock, block: Block, path: str
) -> tuple[ConvBlock, float | None]:
    """The block for a conv, and |origin| / |W| where it starts at the conv's kernel."""
    assert isinstance(conv, _ConvNd)
    block = replace(block, scaling_layer=growth.scaling)
    block = with_origin(block) if growth.init == "preserve" else block
    new = block_for(conv, block, needs_norm=growth.norm)
    if tuple(new.branches) != growth.branches:
        raise ReparamError(
            f"the plan asks for the branches {list(growth.branches)}, "
            f"block {block.name} gives {list(new.branches)}",
            path=path,
        )
    keep = growth.init == "preserve" and not conv.weight.is_meta
    fresh = [name for name in new.branches if name != "origin"]
    ratio = preserve(new, conv.weight, fresh) if keep else None
    if is_channels_last(conv.weight):
        new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    new.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None:
        bias = new.own_bias() if new.norm is None else new.norm.bias
        assert isinstance(bias, nn.Parameter)
        bias.requires_grad_(conv.bias.requires_grad)
    return new, ratio


def grow(module: nn.Module, growth: MoreBranches, block: Block, path: str) -> float | None:
    """Adds the branches of a block that another lacks; |origin| / |W| where its kernel is kept."""
    if not isinstance(module, LinearBlock):
        raise ReparamError("the plan extends a linear block, here is none", path=path)
    weight = module.operator().weight.detach().clone()
    new = missing(module, block)
    is_frozen = not any(p.requires_grad for p in module.parameters())
    extend(module, new, dict(block.scaling))
    if is_frozen:
        module.requires_grad_(False)
    if growth.init != "preserve" or weight.is_meta:
        return None
    # The remainder is written into a new one: the user's kernel stays as it is, should this fail.
    module.branches["origin"] = copy.deepcopy(module.branches["origin"])
    return preserve(module, weight, new)


def missing(block: LinearBlock, wanted: Block) -> dict[str, nn.Module]:
    """The branches of a kind of block that one lacks."""
    made = wanted.make(block.operator()) if "origin" in block.branches else {}
    return {name: branch for name, branch in made.items() if name not in block.branches}


def block_for(conv: _ConvNd, block: Block, *, needs_norm: bool) -> ConvBlock:
    """The block for a conv: on features, to be squeezed, or with the conv's own forward."""
    if block.is_offline:
        return OfflineBlock(conv, block)
    if own_forward_reason(conv) is not None:
        return OwnForwardConv(conv, block)
    return LinearBlock(conv, block, norm=_post_norm(conv) if needs_norm else None)


def planned_block(name: str, block: Block | Literal["auto"]) -> Block:
    """The kind of block that a plan names: a published one, or the one that was given."""
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
