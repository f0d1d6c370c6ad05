"""Runs passes on a model: on a copy, with its real forwards recorded, and tried before it is given.

What the verbs have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from orepa_compiler.capture import untraced_owners
from orepa_compiler.capture.arguments import calls_with
from orepa_compiler.capture.effects.randomness import random_state_kept
from orepa_compiler.capture.recording import Recording, record
from orepa_compiler.capture.skeleton import check_copied, meta_copy, value_copy
from orepa_compiler.generation.store import no_kernel_kept
from orepa_compiler.passes import (
    Pipeline,
    is_leaf,
)
from orepa_compiler.passes.adopt import own_method, unfinished
from orepa_compiler.planning import Plan
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

NOT_CHECKED = "not checked: give inputs="


def make_checked(
    make: Callable[[nn.Module, Kept, list[Batch] | None], Made],
    model: nn.Module,
    inputs: Inputs,
    *,
    wanted: Wanted,
    inplace: bool,
) -> Made:
    """Calls make with the model or a copy of it, and tries what it made on the inputs, if any.

    The plan says whether that was done.
    """
    with no_kernel_kept():
        if inputs is None or any(parameter.is_meta for parameter in model.parameters()):
            made, plan = make(model if inplace else copy_model(model), {}, inputs)
            return made, replace(plan, checked=NOT_CHECKED)
        batches = batches_of(inputs)
        return tried(model, make, copy_model, batches, wanted=wanted, inplace=inplace)


def run_passes(
    pipeline: Pipeline,
    target: nn.Module,
    *,
    plan: Plan | None = None,
    inputs: Inputs = None,
    kept: Kept | None = None,
) -> Made:
    """The target after the passes, in place, and the plan that was applied."""
    if not pipeline.passes:
        return target, Plan()
    recording = record_forwards(target, inputs, modes=pipeline.modes)
    with torch.no_grad():
        return pipeline.run(target, plan=plan, recording=recording, kept=kept)


def collapse_model(
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
        return run_passes(pipeline, target, plan=plan, inputs=inputs, kept=kept)
    at = names.index("adopt")
    first, last = Pipeline(pipeline.passes[:at]), Pipeline(pipeline.passes[at + 1 :])
    target, done = run_passes(first, target, inputs=inputs, kept=kept)
    adopt = Pipeline(pipeline.passes[at : at + 1])
    adopted = Plan()
    left = _left_by(last, target, inputs)
    while paths := unfinished(left, adopted) if left is not None else ():
        own = adopt.configured(paths=paths, inputs=inputs)
        target, more = run_passes(own, target, inputs=inputs, kept=kept)
        adopted += more
        if more.edits:  # else the passes would leave what they left before
            left = _left_by(last, target, inputs)
    target, rest = run_passes(last, target, inputs=inputs, kept=kept)
    return target, done + adopted + rest


def _left_by(pipeline: Pipeline, model: nn.Module, inputs: Inputs) -> nn.Module | None:
    """What the passes would leave of the model, tried on a copy without values.

    None where no module has a way of its own to collapse, so that nobody asks.
    """
    if not any(map(own_method, model.modules())):
        return None
    recording = record_forwards(model, inputs, modes=pipeline.modes)
    return pipeline.run(meta_copy(model), recording=recording, retraces=False)[0]


def record_forwards(
    model: nn.Module, inputs: Inputs, *, modes: Iterable[bool] = (False, True)
) -> Recording:
    """The forwards that cannot be traced in these modes, as they run on the inputs in eval mode."""
    if inputs is None:
        return Recording()
    calls = calls_with(model, batches_of(inputs))
    if any(parameter.is_meta for parameter in model.parameters()):
        return Recording(arguments=calls)
    side = Side("model", model, hint="; give inputs= that it takes")
    seen, owners = Recording(arguments=calls), set[str]()
    # Each recording may show another call of a forward, that cannot be traced as it is called.
    while new := untraced_owners(model, is_leaf=is_leaf, recording=seen, modes=modes) - owners:
        owners |= new
        with random_state_kept(), state_kept(model), evaluation_mode(model):
            found = record(model, owners, lambda: evaluate(side, batches_of(inputs)))
        seen = replace(found, arguments=calls)
    return seen


def copy_model(model: nn.Module) -> nn.Module:
    """A copy with its values; ReparamError for a model whose copy would run its own layers."""
    check_copied(model, meta_copy(model))  # before anything large is copied
    return value_copy(model)
