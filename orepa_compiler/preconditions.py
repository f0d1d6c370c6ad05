"""Checks what the verbs ask of a model, its inputs and a plan before they begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.classifiers import is_conv_like
from orepa_compiler.analysis.functional import calls_conv
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture.skeleton import check_wrapper, meta_copy
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes.expand.options import Init, NewBlock, PostNorm, growth_of
from orepa_compiler.planning import Plan
from orepa_compiler.quantization.layers import rounded_layers
from orepa_compiler.rewriting.selection import Where, selection
from orepa_compiler.verification.evaluation import batches_of


def check_model(
    model: nn.Module, *, also_functional: bool = False, also_linear: bool = False
) -> None:
    """A model that is not wrapped, with a conv: a layer, or also one that is called as F.conv2d.

    also_linear: a linear layer will do.
    """
    if not isinstance(model, nn.Module):
        raise ReparamError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    check_wrapper(model)
    convs = [(p, m) for p, m in model.named_modules() if is_conv_like(m)]
    has_conv = convs or any(isinstance(m, ConvBlock) for m in model.modules())
    has_conv = has_conv or (also_linear and any(isinstance(m, nn.Linear) for m in model.modules()))
    if not has_conv and not (also_functional and calls_conv(meta_copy(model))):
        is_exported = isinstance(model, fx.GraphModule) and any(
            isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes
        )
        hint = "; it is a graph of torch.export: pass the nn.Module that was exported"
        raise ReparamError(
            f"{type(model).__name__} has no conv, so there is nothing to re-parameterize"
            f"{hint if is_exported else ''}"
        )
    for path, conv in convs:
        assert isinstance(conv, _ConvNd)
        if not conv.weight.is_floating_point():
            raise ReparamError(
                f"its weight is {conv.weight.dtype}; only floating-point convs can be rewritten",
                path=path,
            )


def check_unrounded(model: nn.Module, verb: str) -> None:
    """A model whose layers round nothing: what is made of one that does would not be known."""
    layers = rounded_layers(model)
    if layers:
        raise ReparamError(
            f"it rounds to int8 ({len(layers)} such layers), and {verb} works on a model that does "
            "not: call it before fake_quantize, or orepa.drop_ranges(model) first",
            path=next(iter(layers)),
        )


def check_inputs(inputs: Any) -> None:
    if inputs is not None and not batches_of(inputs):
        raise ReparamError("inputs: an empty list; give at least one batch")


def check_values(model: nn.Module, why: str) -> None:
    for path, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ReparamError(f"the weights are on the meta device: {why}", path=path)


def check_plan(plan: Plan, *, init: Init, post_norm: PostNorm) -> None:
    """A plan says how blocks start and where norms go: another wish beside it is an error."""
    for edit in plan.of("expand").edits:
        growth = growth_of(edit)
        if (made := growth.init) != init:
            raise ReparamError(
                f"the plan was made with init={made!r}, not {init!r}; make it with plan(init=...)",
                path=edit.path,
            )
        if isinstance(growth, NewBlock) and growth.norm and post_norm == "none":
            raise ReparamError(
                "the plan inserts a norm here; make it with plan(post_norm='none')", path=edit.path
            )


def check_cut(model: nn.Module, where: Where, names: tuple[str, ...] | None) -> None:
    """Some block must be selected, and each named branch must be there and be no origin."""
    blocks = {path: m for path, m in model.named_modules() if isinstance(m, ConvBlock)}
    is_selected = selection(where)
    selected = [block for path, block in blocks.items() if is_selected(path, block)]
    if not selected:
        raise ReparamError(
            f"where={where!r} selects no block of {len(blocks)}"
            + (f"; the first is {next(iter(blocks))!r}" if blocks else "; expand the model first")
        )
    found = dict.fromkeys(name for block in selected for name in block.branches)
    for name in names or ():
        if name == "origin":
            raise ReparamError(
                "the origin takes the kernels of other branches, so it cannot be cut; "
                "leave out branches= to make plain convs"
            )
        if name not in found:
            raise ReparamError(
                f"no selected block has a branch {name!r}; they have {', '.join(found)}"
            )
    if names == ():
        raise ReparamError("branches= is empty; name some, or leave it out to cut all of them")
