"""Defines the verbs plan, expand, cut and collapse."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from orepa_compiler.blocks import Block, ConvBlock
from orepa_compiler.blocks.catalogue import named
from orepa_compiler.capture.skeleton import meta_copy
from orepa_compiler.errors import NormsLeftWarning, NothingExpandedWarning, ReparamError
from orepa_compiler.int8.verbs import fake_quantize
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
)
from orepa_compiler.passes.expand import Init, PostNorm
from orepa_compiler.passes.fake_quantize import DropRanges, FakeQuantize
from orepa_compiler.planning import Plan, record_plan
from orepa_compiler.planning.cost import conv_costs
from orepa_compiler.planning.step_cost import affordable, with_step_costs
from orepa_compiler.preconditions import (
    check_cut,
    check_inputs,
    check_model,
    check_plan,
    check_unrounded,
    check_values,
)
from orepa_compiler.quantization.carrying import ranges_of, with_ranges, without_ranges
from orepa_compiler.rewriting.selection import Where
from orepa_compiler.running import (
    Inputs,
    Made,
    collapse_model,
    copy_model,
    make_checked,
    record_forwards,
    run_passes,
)
from orepa_compiler.training.calibration import calibrate
from orepa_compiler.validation.trial import Kept, Wanted
from orepa_compiler.verification.evaluation import (
    Batch,
)

# The layers that collapse folds into the conv before them, and how a reason begins where none is.
_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "BatchNormAct2d")
_NO_CONV = "no conv alone feeds it"


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
    """Shows what expand would do, as a table: a dry run on a copy without values.

        print(orepa.plan(model, inputs=images))

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
    passes = _expansion(pipeline, options, None)
    recording = record_forwards(model, inputs, modes=passes.modes)
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
    """Makes a block, squeezed into one conv, of every eligible conv: the training form.

        model = orepa.expand(torchvision.models.resnet18(), inputs=images)

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
        recording = record_forwards(model, inputs, modes=passes.modes)
        dry, made = passes.run(meta_copy(model), plan=plan, recording=recording)
        plan = _costed(model, dry, made, inputs=inputs, max_cost=max_cost)

    def make(target: nn.Module, kept: Kept, batches: list[Batch] | None) -> Made:
        expanded, applied = run_passes(passes, target, plan=plan, inputs=batches, kept=kept)
        if batches is not None:
            calibrate(expanded, batches)
        return expanded, applied

    wanted = Wanted(outputs=init == "preserve", training=True)
    expanded, applied = make_checked(make, model, inputs, wanted=wanted, inplace=inplace)
    record_plan(expanded, applied)
    if not any(isinstance(module, ConvBlock) for module in expanded.modules()):
        _warn_of_nothing(applied)
    return expanded if quantize is None else fake_quantize(expanded, inputs=inputs, inplace=True)


def cut(
    model: nn.Module,
    *,
    where: Where = None,
    branches: str | Iterable[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Makes blocks plain convs again, or takes some of their branches away.

        model = orepa.cut(model, where="layer1.*", branches=["average"])

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
    target = model if inplace else copy_model(model)
    less, applied = run_passes(Pipeline((Cut(where=where, branches=names),)), target)
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
    """Makes plain convs of the model's blocks, branches and BatchNorms: its deploy form.

        deploy = orepa.collapse(model, inputs=images)

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
        model, inplace = without_ranges(model if inplace else copy_model(model)), True

    def make(target: nn.Module, kept: Kept, batches: list[Batch] | None) -> Made:
        return collapse_model(passes, target, plan=plan, inputs=batches, kept=kept)

    deploy, applied = make_checked(make, model, inputs, wanted=Wanted(), inplace=inplace)
    deploy = with_ranges(deploy, ranges)
    record_plan(deploy, applied)
    if fold_norm:
        _warn_of_norms(applied, has_inputs=inputs is not None)
    return deploy


def collapsed_by(model: nn.Module, plan: Plan, inputs: Inputs) -> nn.Module:
    """The collapse of a copy by a plan that was applied before; nothing is checked."""
    return collapse_model(COLLAPSE, copy_model(model), plan=plan, inputs=inputs, kept={})[0]


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
    stays = block == "auto" or block.is_offline
    is_planned = plan is not None and plan.of("linearize").edits
    return passes.without("linearize") if stays and not is_planned else passes


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
