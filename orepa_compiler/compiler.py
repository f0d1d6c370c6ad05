"""The verbs: plan, expand, collapse."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.blocks import Block, LinearBlock
from orepa_compiler.calibration import calibrate
from orepa_compiler.capture import untraced_owners
from orepa_compiler.cost import conv_macs
from orepa_compiler.errors import ReparamError
from orepa_compiler.layers import is_conv_like
from orepa_compiler.passes import Collapse, Expand, Linearize, Pipeline, Squeeze, is_leaf
from orepa_compiler.passes.expand import Init, PostNorm
from orepa_compiler.planning import Plan, record_plan
from orepa_compiler.recording import Recording, record
from orepa_compiler.selection import Where
from orepa_compiler.skeleton import check_wrapper, meta_copy
from orepa_compiler.verification.evaluation import Side, batches_of, evaluate, evaluation_mode

Inputs = Any


def plan(
    model: nn.Module,
    *,
    block: Block | Literal["auto"] = "auto",
    init: Init = "preserve",
    where: Where = None,
    post_norm: PostNorm = "auto",
    inputs: Inputs = None,
) -> Plan:
    """What expand would do, as a table: a dry run on a copy without values.

    Every conv is either expanded or listed with the reason why it is left alone.
    inputs: a batch, to count each conv's MACs for one image and to record the forwards that cannot
    be traced; the rest as in expand.
    Raises ReparamError as expand does.
    """
    _check_model(model)
    _check_inputs(inputs)
    pipeline = _expansion(block=block, init=init, where=where, post_norm=post_norm)
    recording = _recording(model, inputs)
    made = pipeline.run(meta_copy(model), recording=recording)[1]
    return made if inputs is None else _with_macs(made, conv_macs(model, inputs))


def expand(
    model: nn.Module,
    *,
    block: Block | Literal["auto"] = "auto",
    init: Init = "preserve",
    where: Where = None,
    post_norm: PostNorm = "auto",
    plan: Plan | None = None,
    inputs: Inputs = None,
    inplace: bool = False,
) -> nn.Module:
    """The model in training form: every eligible conv becomes a block, squeezed into one conv.

    W_e = sum_m diag(v_m) W_m, made anew at each step     (Hu et al. 2022, Eq. 3 and 4, Fig. 6)

    block: which block; "auto" chooses by kernel size. init: "preserve" starts at the present
    kernels, so outputs do not change; "paper" is the published from-scratch recipe and discards
    them. where: a glob on paths, several, or a predicate (path, module). post_norm: "auto" inserts
    a BatchNorm behind an expanded conv that no norm follows, "none" does not. plan: apply this
    plan, made with the same init. inputs: a batch, to calibrate inserted norms and to record the
    forwards that cannot be traced. inplace: rewrite the model itself.

    Raises ReparamError for a model without convs, with weights that are not floating point or have
    no values, that is wrapped (DDP, compile), or that cannot be copied; it is untouched then.
    """
    _check_model(model)
    _check_inputs(inputs)
    if init == "preserve":
        _check_values(model, "no kernel to preserve; load weights or use init='paper'")
    pipeline = _expansion(block=block, init=init, where=where, post_norm=post_norm)
    if plan is not None:
        _check_plan(plan, init=init, post_norm=post_norm)
    if plan is not None and plan.of("linearize").edits:
        pipeline = Pipeline((Linearize(), *(p for p in pipeline.passes if p.name != "linearize")))
    expanded = _run(pipeline, model, plan=plan, inputs=inputs, inplace=inplace)
    if inputs is not None:
        calibrate(expanded, inputs)
    return expanded


def collapse(
    model: nn.Module,
    *,
    fold_norm: bool = True,
    plan: Plan | None = None,
    inputs: Inputs = None,
    inplace: bool = False,
) -> nn.Module:
    """The model in deploy form: blocks, branches and BatchNorms folded into plain convs.

    W' = diag(g / sqrt(var + eps)) W_e, b' = g (b - mean) / sqrt(var + eps) + beta, in float64, cast
    once. The running statistics are used whatever mode the model is in; the result is in eval mode.
    Two convs are joined only where that costs no more MACs.

    fold_norm: False gives back the architecture that was passed to expand, norms kept. inputs: a
    batch, or a list with one of each size that will be used: where a module's forward cannot be
    traced, real calls on them are recorded, and a norm is folded where all show it behind its conv
    alone.
    Raises ReparamError for a model without convs or without values. The model is then untouched.
    """
    _check_model(model)
    _check_inputs(inputs)
    _check_values(model, "there is nothing to fold; load the weights first")
    pipeline = Pipeline((Collapse(fold_norm=fold_norm),))
    return _run(pipeline, model, plan=plan, inputs=inputs, inplace=inplace)


def replay(model: nn.Module, plan: Plan, *, block: Block | Literal["auto"] = "auto") -> nn.Module:
    """The model after a plan that was recorded before, in place; weights are to be loaded next.

    Raises ReparamError where the plan does not fit the model.
    """
    names = {edit.done_by for edit in plan.edits}
    passes = [
        step
        for step in (Linearize(), Expand(block=block), Squeeze(), Collapse())
        if step.name in names
    ]
    with torch.no_grad():
        model, applied = Pipeline(tuple(passes)).run(model, plan=plan)
    record_plan(model, applied)
    return model


def _expansion(
    *, block: Block | Literal["auto"], init: Init, where: Where, post_norm: PostNorm
) -> Pipeline:
    if init not in ("preserve", "paper"):
        raise ReparamError(f"init={init!r} is neither 'preserve' nor 'paper'")
    if post_norm not in ("auto", "none"):
        raise ReparamError(f"post_norm={post_norm!r} is neither 'auto' nor 'none'")
    if block != "auto" and not isinstance(block, Block):
        raise ReparamError(f"block={block!r} is neither 'auto' nor a Block such as orepa.OREPA")
    if where is not None and not callable(where) and not isinstance(where, str):
        where = tuple(where) if isinstance(where, Iterable) else where  # each pass reads it
    expansion = Expand(block=block, init=init, where=where, post_norm=post_norm)
    if block == "auto":  # branches with norms of their own stay as they are
        return Pipeline((expansion, Squeeze()))
    return Pipeline((Linearize(where=where), expansion, Squeeze()))


def _check_plan(plan: Plan, *, init: Init, post_norm: PostNorm) -> None:
    """A plan says how blocks start and where norms go: another wish beside it is an error."""
    for edit in plan.of("expand").edits:
        made = edit.options.get("init")
        if made != init:
            raise ReparamError(
                f"the plan was made with init={made!r}, not {init!r}; make it with plan(init=...)",
                path=edit.path,
            )
        if edit.options.get("norm") and post_norm == "none":
            raise ReparamError(
                "the plan inserts a norm here; make it with plan(post_norm='none')", path=edit.path
            )


def _run(
    pipeline: Pipeline, model: nn.Module, *, plan: Plan | None, inputs: Inputs, inplace: bool
) -> nn.Module:
    recording = _recording(model, inputs)
    target = model if inplace else _copy(model)
    with torch.no_grad():
        target, applied = pipeline.run(target, plan=plan, recording=recording)
    record_plan(target, applied)
    return target


def _recording(model: nn.Module, inputs: Inputs) -> Recording:
    """The forwards that cannot be traced, as they run on the inputs in eval mode."""
    if inputs is None or any(parameter.is_meta for parameter in model.parameters()):
        return Recording()
    owners = untraced_owners(model, is_leaf=is_leaf)
    if not owners:
        return Recording()
    side = Side("model", model, hint="; give inputs= that it takes")
    with evaluation_mode(model):
        return record(model, owners, lambda: evaluate(side, batches_of(inputs)))


def _copy(model: nn.Module) -> nn.Module:
    meta_copy(model)  # names what cannot be copied before anything large is
    return copy.deepcopy(model)


def _with_macs(plan: Plan, macs: dict[str, int]) -> Plan:
    """The plan with what each conv costs; a block costs the same, its kernel being one conv's."""
    edits = [
        replace(edit, macs=(macs[edit.path],) * 2) if edit.path in macs else edit
        for edit in plan.edits
    ]
    return Plan(tuple(edits), plan.refusals)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ReparamError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    check_wrapper(model)
    convs = [(p, m) for p, m in model.named_modules() if is_conv_like(m)]
    if not convs and not any(isinstance(m, LinearBlock) for m in model.modules()):
        raise ReparamError(
            f"{type(model).__name__} has no conv, so there is nothing to re-parameterize"
        )
    for path, conv in convs:
        assert isinstance(conv, _ConvNd)
        if not conv.weight.is_floating_point():
            raise ReparamError(
                f"its weight is {conv.weight.dtype}; only floating-point convs can be rewritten",
                path=path,
            )


def _check_inputs(inputs: Inputs) -> None:
    if inputs is not None and not batches_of(inputs):
        raise ReparamError("inputs: an empty list; give at least one batch")


def _check_values(model: nn.Module, why: str) -> None:
    for path, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ReparamError(f"the weights are on the meta device: {why}", path=path)
