"""Finds which layers round, and takes their first ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.classifiers import holds_kernel, is_batch_norm, is_idle
from orepa_compiler.capture.effects.randomness import random_state_kept
from orepa_compiler.capture.recording import Recording
from orepa_compiler.capture.skeleton import meta_copy
from orepa_compiler.choices import Preset
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes import Collapse, Pipeline
from orepa_compiler.passes.collapse.folds import (
    FoldBlock,
    FoldConcatenation,
    FoldGraph,
    FoldRegion,
    folds,
)
from orepa_compiler.passes.fake_quantize import FakeQuantize
from orepa_compiler.planning import Plan
from orepa_compiler.quantization.layers import Rounded, rounded_layers
from orepa_compiler.quantization.quantizers import NEW_RANGE, Quantizer, switch
from orepa_compiler.rewriting.selection import Where
from orepa_compiler.validation.state import state_kept
from orepa_compiler.verification.evaluation import evaluation_mode, run_to

Made = tuple[nn.Module, Plan]


def quantized(model: nn.Module, recording: Recording, *, preset: Preset, where: Where) -> Made:
    """Puts layers that round into the model; the plan has the reasons for the others.

    Raises ReparamError where none rounds.
    """
    reasons = dict(_made_anew(model, recording))
    step = FakeQuantize(preset=preset, where=where, reasons=reasons)
    model, plan = Pipeline((step,)).run(model)
    if not plan.edits:
        why = "; ".join(dict.fromkeys(f"{r.path}: {r.reason}" for r in plan.refusals))
        raise ReparamError(f"no layer can be rounded to int8: {why or 'there is none to round'}")
    return model, plan


def _made_anew(model: nn.Module, recording: Recording) -> Iterator[tuple[str, str]]:
    """Finds the layers whose deployed kernel is not their own scaled by output channel, and why."""
    skeleton = meta_copy(model)
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    steps = Pipeline((Collapse(),))
    _, plan = steps.run(meta_copy(model), recording=recording, retraces=False)
    for fold in folds(plan.edits):
        if isinstance(fold, (FoldBlock, FoldConcatenation)):
            continue
        kernels = [path for path in fold.modules if holds_kernel(modules[path])]
        for path in kernels:
            if reason := _reason(fold, path, kernels, modules):
                yield path, reason


def _reason(fold: Any, path: str, kernels: list[str], modules: dict[str, nn.Module]) -> str:
    others = [other for other in kernels if other != path]
    if others:
        return f"the collapse makes one kernel of it and {others[0]}: expand the block they are in"
    if isinstance(fold, FoldGraph):
        return "the collapse writes the forward around it anew, with a kernel that is not its own"
    if isinstance(fold, FoldRegion):
        at = fold.modules.index(path)
        before, behind = fold.modules[:at], fold.modules[at + 1 :]
        for other in before:
            if not is_idle(modules[other]):
                return f"the collapse folds {other}, before it, into its kernel by input channel"
        for other in behind:
            if not (is_idle(modules[other]) or is_batch_norm(modules[other])):
                return f"the collapse folds {other} into its kernel"
    return ""


@torch.no_grad()
def observe(model: nn.Module, batches: Sequence[tuple[Any, ...]], *, widest: bool = False) -> None:
    """Gives the maps of the layers that round the mean of their ranges on these batches.

    widest: the widest range instead, as an export with calibration data takes it.
    """
    inputs = [layer.input_quantizer for layer in rounded_layers(model).values()]
    with random_state_kept(), state_kept(model):
        with evaluation_mode(model):
            switch(model, on=False)  # ranges are those of the float maps
            for quantizer in inputs:
                quantizer.train()
            for number, batch in enumerate(batches, 1):
                _weigh(inputs, 1.0 if widest else 1 / number)
                known = [_range(quantizer) for quantizer in inputs]
                run_to("take ranges", model, batch, number - 1)
                if widest:
                    _widen(inputs, known)
        found = [{k: v.clone() for k, v in q.state_dict().items()} for q in inputs]
    _weigh(inputs, NEW_RANGE)
    for quantizer, state in zip(inputs, found, strict=True):
        quantizer.load_state_dict(state)
    switch(model, on=True)


def _range(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    observer = quantizer.activation_post_process
    return observer.min_val.clone(), observer.max_val.clone()


def _widen(quantizers: Sequence[Quantizer], known: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Widens a known range by what is new."""
    for quantizer, (low, high) in zip(quantizers, known, strict=True):
        observer = quantizer.activation_post_process
        observer.min_val.copy_(torch.minimum(low, observer.min_val))
        observer.max_val.copy_(torch.maximum(high, observer.max_val))
        step, point = quantizer.calculate_qparams()
        quantizer.scale.copy_(step)
        quantizer.zero_point.copy_(point)


def _weigh(quantizers: Sequence[Quantizer], part: float) -> None:
    """Sets how much of the next range counts."""
    for quantizer in quantizers:
        quantizer.activation_post_process.averaging_constant = part


def check_rounds(model: nn.Module) -> dict[str, Rounded]:
    """Finds the layers that round. Raises ReparamError where there is none."""
    layers = rounded_layers(model)
    if not layers:
        raise ReparamError(
            f"{type(model).__name__} has no layer that rounds to int8; call orepa.fake_quantize "
            "first"
        )
    return layers
