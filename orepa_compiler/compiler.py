"""The verbs: plan, expand, cut, collapse."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from orepa_compiler.blocks import Block, LinearBlock
from orepa_compiler.blocks.catalogue import named
from orepa_compiler.capture import untraced_owners
from orepa_compiler.capture.arguments import calls_with
from orepa_compiler.capture.randomness import random_state_kept
from orepa_compiler.capture.recording import Recording, record
from orepa_compiler.capture.skeleton import check_copied, meta_copy, value_copy
from orepa_compiler.cost import conv_costs
from orepa_compiler.errors import NormsLeftWarning, NothingExpandedWarning, ReparamError
from orepa_compiler.passes import (
    COLLAPSE,
    EXPAND,
    Adopt,
    Collapse,
    Cut,
    Expand,
    Linearize,
    Pass,
    Pipeline,
    Squeeze,
    is_leaf,
)
from orepa_compiler.passes.adopt import own_method, unfinished
from orepa_compiler.passes.expand import Init, PostNorm
from orepa_compiler.passes.fake_quantize import DropRanges, FakeQuantize
from orepa_compiler.planning import Plan, record_plan
from orepa_compiler.preconditions import (
    check_cut,
    check_inputs,
    check_model,
    check_plan,
    check_unrounded,
    check_values,
)
from orepa_compiler.quantization.carrying import ranges_of, with_ranges, without_ranges
from orepa_compiler.quantization.quantizers import Preset, check_preset, check_range, freeze
from orepa_compiler.quantizing import check_rounds, observe, quantized
from orepa_compiler.selection import Where
from orepa_compiler.step_cost import affordable, with_step_costs
from orepa_compiler.training.calibration import calibrate
from orepa_compiler.validation.state import state_kept
from orepa_compiler.validation.trial import Kept, Wanted, tried
from orepa_compiler.verification.evaluation import (
    Batch,
    Side,
    batches_of,
    evaluate,
    evaluation_mode,
)

Inputs = Any
Made = tuple[nn.Module, Plan]

# The layers that collapse folds into the conv before them, and how a reason begins where none is.
_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "BatchNormAct2d")
_NO_CONV = "no conv alone feeds it"

NOT_CHECKED = "not checked: give inputs="


def plan(
    model: nn.Module,
    *,
    block: Block | str = "auto",
    init: Init = "preserve",
    where: Where = None,
    post_norm: PostNorm = "auto",
    inputs: Inputs = None,
    max_cost: float | None = None,
    pipeline: Pipeline = EXPAND,
) -> Plan:
    """What expand would do, as a table: a dry run on a copy without values.

    Every conv is either expanded or listed with the reason why it is left alone.
    inputs: a batch, to count each conv's MACs for one image and what its block adds to a training
    step at that batch, and to record the forwards that cannot be traced; nothing is checked on it.
    The rest as in expand.
    Raises ReparamError as expand does.
    """
    check_model(model)
    check_unrounded(model, "plan")
    check_inputs(inputs)
    options = _expansion_options(block=block, init=init, where=where, post_norm=post_norm)
    recording = _recording(model, inputs)
    passes = _expansion(pipeline, options, None)
    expanded, made = passes.run(meta_copy(model), recording=recording)
    return _costed(model, expanded, made, inputs=inputs, max_cost=max_cost)


def expand(
    model: nn.Module,
    *,
    block: Block | str = "auto",
    init: Init = "preserve",
    where: Where = None,
    post_norm: PostNorm = "auto",
    plan: Plan | None = None,
    inputs: Inputs = None,
    max_cost: float | None = None,
    inplace: bool = False,
    pipeline: Pipeline = EXPAND,
    quantize: Literal["int8"] | None = None,
) -> nn.Module:
    """The model in training form: every eligible conv becomes a block, squeezed into one conv.

    W_e = sum_m diag(v_m) W_m, made anew at each step     (Hu et al. 2022, Eq. 3 and 4, Fig. 6)

    block: which block, by its name or as a value; "auto" chooses by the kernel's size, and by
    whether the net has residual connections. init: "preserve" starts at the present kernels, so
    outputs do not change; "paper" is the published from-scratch recipe and discards them. where: a
    glob on paths, several, or a predicate (path, module). post_norm: "auto" inserts a BatchNorm
    behind an expanded conv that no norm follows, "none" does not. plan: apply this plan, made with
    the same init. inputs: a batch, or a list of them, to calibrate inserted norms, to record the
    forwards that cannot be traced, and to check what was made: outputs in eval mode, and what a
    step trains. What does not agree is left alone, with the error as the reason. max_cost: how much
    dearer blocks may make the arithmetic of the convs of a training step at the batch in inputs,
    0.15 for 15 %: the dearest are left out. inplace: rewrite the model itself. pipeline: which
    passes run, with these options. quantize: "int8" trains what an int8 file will compute, as
    fake_quantize does.

    Raises ReparamError for a model without convs, with weights that are not floating point or have
    no values, that is wrapped (DDP, compile), or that cannot be copied; it is untouched then. Warns
    (NothingExpandedWarning) where no conv became a block, with the reasons.
    """
    check_model(model)
    check_unrounded(model, "expand")
    check_inputs(inputs)
    if quantize not in (None, "int8"):
        raise ReparamError(f"quantize={quantize!r} is neither 'int8' nor None")
    if init == "preserve":
        check_values(model, "no kernel to preserve; load weights or use init='paper'")
    options = _expansion_options(block=block, init=init, where=where, post_norm=post_norm)
    if plan is not None:
        check_plan(plan, init=init, post_norm=post_norm)
    passes = _expansion(pipeline, options, plan)
    if max_cost is not None:
        dry, made = passes.run(meta_copy(model), plan=plan, recording=_recording(model, inputs))
        plan = _costed(model, dry, made, inputs=inputs, max_cost=max_cost)

    def make(target: nn.Module, kept: Kept, batches: list[Batch] | None) -> Made:
        expanded, applied = _run(passes, target, plan=plan, inputs=batches, kept=kept)
        if batches is not None:
            calibrate(expanded, batches)
        return expanded, applied

    wanted = Wanted(outputs=init == "preserve", training=True)
    expanded, applied = _made(make, model, inputs, wanted=wanted, inplace=inplace)
    record_plan(expanded, applied)
    if not any(isinstance(module, LinearBlock) for module in expanded.modules()):
        _warn_of_nothing(applied)
    return expanded if quantize is None else fake_quantize(expanded, inputs=inputs, inplace=True)


def fake_quantize(
    model: nn.Module,
    *,
    preset: Preset = "tensorrt",
    where: Where = None,
    inputs: Inputs = None,
    inplace: bool = False,
) -> nn.Module:
    """The model with layers that round to int8 as the exported file will, to be trained so.

    y = conv(Q_x(x), Q_W(W_e)) + b, with torch's fake quantizers: Q_W symmetric, a step for each
    output channel, on the kernel that the branches make; Q_x one step for all of the maps

    The norm that is folded in later scales the steps of Q_W, and changes no integer. Ranges follow
    the model in train mode until freeze_ranges; eval mode changes none. collapse carries them over,
    and export_onnx(precision="int8") writes them without calibration.

    preset: "tensorrt" for symmetric maps in int8, "cpu" for maps in uint8 with a zero point, as
    onnxruntime and OpenVINO multiply them. where: which layers; the others stay in float32. inputs:
    a batch, or a list of them, on which the maps get their first ranges. inplace: rewrite the model
    itself, whose optimizer goes on. Layers that are not rounded are in recorded_plans(model)[-1],
    each with the reason.
    Raises ReparamError for a model that rounds already, and where no layer can be rounded.
    """
    check_model(model, also_linear=True)
    check_unrounded(model, "fake_quantize")
    check_inputs(inputs)
    check_preset(preset)
    check_values(model, "there is no kernel to take a range of; load the weights first")
    recording = _recording(model, inputs)
    target = model if inplace else _copy(model)
    target, applied = quantized(target, recording, preset=preset, where=where)
    if inputs is not None:
        observe(target, batches_of(inputs))
    record_plan(target, applied)
    return target


def freeze_ranges(model: nn.Module) -> nn.Module:
    """The model, in place, with its int8 ranges as they are: training goes on beneath them.

    Call it for the last part of the training, when the ranges have settled.
    Raises ReparamError for a model that does not round, and for a layer without a range: no maps
    went through it, they were not finite, or all of them were 0.
    """
    for path, layer in check_rounds(model).items():
        check_range(layer.input_quantizer, path)
    freeze(model)
    return model


def drop_ranges(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model without rounding to int8: the layers that fake_quantize found, as trained since.

    Of a collapsed model the kernels stay rounded, and the maps are no longer.
    Raises ReparamError for a model that does not round.
    """
    check_rounds(model)
    target, applied = Pipeline((DropRanges(),)).run(model if inplace else _copy(model))
    record_plan(target, applied)
    return target


def cut(
    model: nn.Module,
    *,
    where: Where = None,
    branches: str | Iterable[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """The model with blocks made plain convs again, or with some of their branches gone.

    W_origin' = v_origin W_origin + sum_m v_m W_m over the branches that go, v_origin' = 1

    Outputs stay the same in both modes: norms stay as they are, and the model stays in training.
    An inserted norm stays too, behind the one branch that is left. map_optimizer then carries the
    optimizer over.

    where: which blocks; branches: names of the branches to cut, None for all of them.
    Raises ReparamError where no block is selected, none has such a branch, or nothing may be cut.
    """
    check_model(model)
    check_unrounded(model, "cut")
    check_values(model, "there is nothing to add to the origin; load the weights first")
    names = (branches,) if isinstance(branches, str) else branches
    names = None if names is None else tuple(names)
    check_cut(model, where, names)
    target = model if inplace else _copy(model)
    less, applied = _run(Pipeline((Cut(where=where, branches=names),)), target)
    if not applied.edits:
        raise ReparamError(applied.refusals[0].reason, path=applied.refusals[0].path)
    record_plan(less, applied)
    return less


def collapse(
    model: nn.Module,
    *,
    fold_norm: bool = True,
    plan: Plan | None = None,
    inputs: Inputs = None,
    inplace: bool = False,
    pipeline: Pipeline = COLLAPSE,
) -> nn.Module:
    """The model in deploy form: blocks, branches and BatchNorms folded into plain convs.

    W' = diag(g / sqrt(var + eps)) W_e, b' = g (b - mean) / sqrt(var + eps) + beta, in float64, cast
    once. The running statistics are used whatever mode the model is in; the result is in eval mode.
    Two convs are joined only where that costs no more MACs. A module in which norms would be left,
    and that has a fuse(), reparameterize() or switch_to_deploy() of its own, is replaced by what
    that makes of it, if the outputs agree.

    fold_norm: False gives back the architecture that was passed to expand, norms kept. inputs: a
    batch, or a list with one of each size that will be used: where a module's forward cannot be
    traced, real calls on them are recorded, and a norm is folded where all show it behind its conv
    alone. What was made is checked on them: what does not agree is left alone, with the error as
    the reason. pipeline: which passes run, with these options. A model that rounds to int8
    (fake_quantize) keeps its ranges, now frozen, and has the kernels that the int8 file holds.
    Raises ReparamError for a model without convs or without values. The model is then untouched.
    Warns of norms that stay behind the convs that feed them.
    """
    check_model(model, also_functional=True)
    check_inputs(inputs)
    check_values(model, "there is nothing to fold; load the weights first")
    passes = pipeline.configured(fold_norm=fold_norm)
    ranges = ranges_of(model)
    if ranges:  # the float model is what is rewritten and checked; its ranges follow it
        model, inplace = without_ranges(model if inplace else _copy(model)), True

    def make(target: nn.Module, kept: Kept, batches: list[Batch] | None) -> Made:
        return _collapsed(passes, target, plan=plan, inputs=batches, kept=kept)

    deploy, applied = _made(make, model, inputs, wanted=Wanted(), inplace=inplace)
    deploy = with_ranges(deploy, ranges)
    record_plan(deploy, applied)
    if fold_norm:
        _warn_of_norms(applied, has_inputs=inputs is not None)
    return deploy


def collapsed_by(model: nn.Module, plan: Plan, inputs: Inputs) -> nn.Module:
    """The collapse of a copy by a plan that was applied before; nothing is checked."""
    return _collapsed(COLLAPSE, _copy(model), plan=plan, inputs=inputs, kept={})[0]


def replay(model: nn.Module, plan: Plan, *, block: Block | Literal["auto"] = "auto") -> nn.Module:
    """The model after a plan that was recorded before, in place; weights are to be loaded next.

    Raises ReparamError where the plan does not fit the model.
    """
    names = {edit.done_by for edit in plan.edits}
    known: tuple[Pass, ...] = (
        *(Linearize(), Expand(block=block), Squeeze(), Cut()),
        *(Adopt(checks=False), Collapse(), FakeQuantize(), DropRanges()),
    )
    passes = tuple(step for step in known if step.name in names)
    ranges = ranges_of(model) if names & {"adopt", "collapse"} else {}
    model = without_ranges(model) if ranges else model
    with torch.no_grad():
        model, applied = Pipeline(passes).run(model, plan=plan)
    model = with_ranges(model, ranges)
    record_plan(model, applied)
    return model


def _expansion_options(
    *, block: Block | str, init: Init, where: Where, post_norm: PostNorm
) -> dict[str, Any]:
    """The options of expand, as the passes of its pipeline take them."""
    if init not in ("preserve", "paper"):
        raise ReparamError(f"init={init!r} is neither 'preserve' nor 'paper'")
    if post_norm not in ("auto", "none"):
        raise ReparamError(f"post_norm={post_norm!r} is neither 'auto' nor 'none'")
    if isinstance(block, str):
        try:
            block = named(block)
        except ReparamError as error:
            raise ReparamError(f"block={block!r}: {error.reason}, or a Block of yours") from error
    elif not isinstance(block, Block):
        raise ReparamError(f"block={block!r} is neither a name nor a Block such as orepa.OREPA")
    if where is not None and not callable(where) and not isinstance(where, str):
        where = tuple(where) if isinstance(where, Iterable) else where  # each pass reads it
    return {"block": block, "init": init, "where": where, "post_norm": post_norm}


def _expansion(pipeline: Pipeline, options: dict[str, Any], plan: Plan | None) -> Pipeline:
    """The pipeline with the options of expand.

    Norms in branches stay as they are, unless a linear block is named, or a plan that says so.
    """
    passes, block = pipeline.configured(**options), options["block"]
    stays = block == "auto" or block.scaling_layer == "norm"
    is_planned = plan is not None and plan.of("linearize").edits
    return passes.without("linearize") if stays and not is_planned else passes


def _collapsed(
    pipeline: Pipeline,
    target: nn.Module,
    *,
    plan: Plan | None,
    inputs: Inputs,
    kept: Kept,
) -> Made:
    """The target after the passes; modules with a way of their own are adopted, one by one.

    That is tried where the pass adopt stands, for as long as the passes behind it would leave work.
    """
    names = [step.name for step in pipeline.passes]
    folds = all(getattr(step, "fold_norm", True) for step in pipeline.passes)
    if "adopt" not in names or plan is not None or not folds:
        return _run(pipeline, target, plan=plan, inputs=inputs, kept=kept)
    at = names.index("adopt")
    first, last = Pipeline(pipeline.passes[:at]), Pipeline(pipeline.passes[at + 1 :])
    target, done = _run(first, target, inputs=inputs, kept=kept)
    adopt = Pipeline(pipeline.passes[at : at + 1])
    adopted = Plan()
    left = _left_by(last, target, inputs)
    while paths := unfinished(left, adopted) if left is not None else ():
        own = adopt.configured(paths=paths, inputs=inputs)
        target, more = _run(own, target, inputs=inputs, kept=kept)
        adopted += more
        if more.edits:  # else the passes would leave what they left before
            left = _left_by(last, target, inputs)
    target, rest = _run(last, target, inputs=inputs, kept=kept)
    return target, done + adopted + rest


def _costed(
    model: nn.Module, expanded: nn.Module, made: Plan, *, inputs: Inputs, max_cost: float | None
) -> Plan:
    """The plan with what it costs, and without what costs too much."""
    if inputs is None:
        if max_cost is not None:
            raise ReparamError("max_cost= needs inputs=: what a block costs depends on the batch")
        return made
    macs, images = conv_costs(model, inputs)
    made = with_step_costs(made.with_macs(macs), expanded, images)
    return made if max_cost is None else affordable(made, macs, max_cost)


def _warn_of_nothing(applied: Plan) -> None:
    reasons = Counter(refusal.reason for refusal in applied.refusals)
    why = "; ".join(f"{count} because: {reason}" for reason, count in reasons.most_common(3))
    warnings.warn(
        f"nothing was expanded, so the model trains as it was. Layers left alone: {why}",
        NothingExpandedWarning,
        stacklevel=3,
    )


def _warn_of_norms(applied: Plan, *, has_inputs: bool) -> None:
    """Norms that a conv alone feeds and that stay: a cost at inference that nobody asked for."""
    norms = [r for r in applied.refusals if r.layer in _NORMS and not r.reason.startswith(_NO_CONV)]
    if not norms:
        return
    first, reason = ", ".join(norm.path for norm in norms[:3]), norms[0].reason
    more = f" and {len(norms) - 3} more" if len(norms) > 3 else ""
    asks = not has_inputs and any("inputs=" in norm.reason for norm in norms)
    helps = "inputs= may help: real calls are then recorded" if asks else "inputs= does not help"
    warnings.warn(
        f"{len(norms)} {'norm stays' if len(norms) == 1 else 'norms stay'} behind convs: "
        f"{first}{more} ({reason}); {helps}",
        NormsLeftWarning,
        stacklevel=3,
    )


def _made(
    make: Callable[[nn.Module, Kept, list[Batch] | None], Made],
    model: nn.Module,
    inputs: Inputs,
    *,
    wanted: Wanted,
    inplace: bool,
) -> Made:
    """What is made of the model, tried on the inputs where there are some; its plan says so."""
    if inputs is None or any(parameter.is_meta for parameter in model.parameters()):
        made, plan = make(model if inplace else _copy(model), {}, inputs)
        return made, replace(plan, checked=NOT_CHECKED)
    batches = batches_of(inputs)
    return tried(model, make, _copy, batches, wanted=wanted, inplace=inplace)


def _run(
    pipeline: Pipeline,
    target: nn.Module,
    *,
    plan: Plan | None = None,
    inputs: Inputs = None,
    kept: Kept | None = None,
) -> Made:
    if not pipeline.passes:
        return target, Plan()
    recording = _recording(target, inputs)
    with torch.no_grad():
        return pipeline.run(target, plan=plan, recording=recording, kept=kept)


def _left_by(pipeline: Pipeline, model: nn.Module, inputs: Inputs) -> nn.Module | None:
    """What the passes would leave of the model, tried on a copy without values.

    None where no module has a way of its own to collapse, so that nobody asks.
    """
    if not any(map(own_method, model.modules())):
        return None
    recording = _recording(model, inputs)
    return pipeline.run(meta_copy(model), recording=recording, retraces=False)[0]


def _recording(model: nn.Module, inputs: Inputs) -> Recording:
    """The forwards that cannot be traced, as they run on the inputs in eval mode."""
    if inputs is None:
        return Recording()
    calls = calls_with(model, batches_of(inputs))
    if any(parameter.is_meta for parameter in model.parameters()):
        return Recording(arguments=calls)
    side = Side("model", model, hint="; give inputs= that it takes")
    seen, owners = Recording(arguments=calls), set[str]()
    # Each recording may show another call of a forward, that cannot be traced as it is called.
    while new := untraced_owners(model, is_leaf=is_leaf, recording=seen) - owners:
        owners |= new
        with random_state_kept(), state_kept(model), evaluation_mode(model):
            found = record(model, owners, lambda: evaluate(side, batches_of(inputs)))
        seen = replace(found, arguments=calls)
    return seen


def _copy(model: nn.Module) -> nn.Module:
    check_copied(model, meta_copy(model))  # before anything large is copied
    return value_copy(model)
