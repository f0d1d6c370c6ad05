"""One model's row: what it is, what the plan says, and what the checks found."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import orepa_compiler as orepa
from benchmarks.zoo import detection
from benchmarks.zoo.building import (
    Subject,
    parameter_count,
    shorten,
    smaller_siblings,
    without_values,
)
from benchmarks.zoo.checks import Asked, Findings, described, run_checks
from benchmarks.zoo.counting import convs_of, count_plan, watching_norms
from benchmarks.zoo.inputs import Instance, NotComparable, find, memory_needed, observe
from orepa_compiler.capture import untraced_owners
from orepa_compiler.passes import is_leaf

Row = dict[str, Any]


# Below this no expanded model comes near any limit, so that its plan need not be made first.
_SURELY_SMALL = 60_000_000
_SHARE = 0.8  # of the memory limit that weights and gradients may take


@dataclass(frozen=True)
class Limits:
    """Of one model's process: seconds, and bytes of memory.

    convs, parameters: the checks on a model with more are made on a depth-reduced one.
    """

    seconds: float
    memory: float
    convs: float = float("inf")
    parameters: float = float("inf")


def examine(subject: Subject, limits: Limits) -> Row:
    """The row of one model. What any stage raises is in the row."""
    start = time.perf_counter()
    row: Row = {"library": subject.library, "name": subject.name, "family": subject.family}
    try:
        row |= _examined(subject, limits)
    except NotComparable as problem:
        row |= {"status": "not compared", "why": str(problem)}
    except Exception as problem:  # a row, whatever happens: a model is never left out in silence
        row |= {"status": "error", "why": described(problem)}
    row["total_s"] = round(time.perf_counter() - start, 2)
    row["cpu_s"] = round(time.process_time(), 2)
    return row


def _examined(subject: Subject, limits: Limits) -> Row:
    start = time.perf_counter()
    full = Instance(subject).stock()
    convs = convs_of(full)
    row: Row = {
        "class": type(full).__name__,
        "parameters": parameter_count(full),
        "convs": len(convs.all),
        "spatial": len(convs.spatial),
        "transposed": len(convs.transposed),
    }
    if not convs.all:
        return {**row, "status": "no conv"}
    instance, reduced = _affordable(Instance(subject), full, limits)
    plans = _meta_plans(full) if reduced else {}
    del full
    try:
        instance, model, expected = find(instance)
    except NotComparable as problem:
        if reduced.get("reduced_for") == "time":  # what is left does not fit together
            return _examined(subject, Limits(limits.seconds, limits.memory))
        return {**row, **reduced, **plans, "status": "not compared", "why": str(problem)}
    row |= {**reduced, **plans}
    row |= _described(instance, model) | {"find_s": round(time.perf_counter() - start, 2)}
    with watching_norms(model) as norms:
        observe(model, instance.inputs())
    row |= {"norms": norms.total, "norms_behind_conv": len(norms.behind)}
    planned, asked = _plans(instance, model)
    row = {**planned, **row} if reduced else {**row, **planned}  # a reduced one's counts are full
    given = [model]
    del model
    findings = run_checks(instance, given, expected, asked=asked, dtype=torch.float32)
    row |= {**findings.as_row(), "precision": "float32"}
    if findings.is_only_imprecise:
        row |= _in_float64(instance, findings, asked, limits)
    return {**row, "status": status(row)}


def _affordable(instance: Instance, full: nn.Module, limits: Limits) -> tuple[Instance, Row]:
    """The instance that memory and time allow, and how it differs from the full model."""
    fits = _fits(full, limits)
    is_slow = len(convs_of(full).all) > limits.convs or parameter_count(full) > limits.parameters
    if fits and not is_slow:
        return instance, {}
    cause = "time" if fits else "memory"
    short = _shortened(instance)
    row: Row = {"reduced_for": cause, "reduced_by": short.shortened}
    if fits or _fits(without_values(short.stock), limits):
        return short, row if short.shortened else {}
    for sibling in smaller_siblings(instance.subject, full):
        if _fits(without_values(Instance(sibling).stock), limits):
            return Instance(sibling), {"reduced_for": cause, "sibling": sibling.name}
    raise NotComparable("too large, and so is every smaller model of its class")


def _shortened(instance: Instance) -> Instance:
    gone = shorten(without_values(Instance(instance.subject).stock))
    return Instance(**{**vars(instance), "shortened": gone})


def _fits(model: nn.Module, limits: Limits) -> bool:
    before = parameter_count(model)
    if before < _SURELY_SMALL:
        return True
    if memory_needed(model, before) > _SHARE * limits.memory:
        return False
    edits = orepa.plan(model).of("expand").edits
    grown = before + sum(after - was for was, after in (edit.parameters for edit in edits))
    return memory_needed(model, grown) <= _SHARE * limits.memory


def _meta_plans(full: nn.Module) -> Row:
    """The plans of the full model, which has no values: planned on the meta device."""
    convs, model = convs_of(full), full.to("meta")
    start = time.perf_counter()
    plan = orepa.plan(model)
    seconds = time.perf_counter() - start
    everything = orepa.plan(model, where="**")
    return {
        "plan": count_plan(convs, plan),
        "plan_all": count_plan(convs, everything),
        "meta_plan_s": round(seconds, 2),
    }


def _described(instance: Instance, model: nn.Module) -> Row:
    compared = detection.COMPARED if detection.is_detector(model) else "outputs"
    return {
        "size": instance.size,
        "options": instance.options,
        "recipe": list(vars(instance.recipe).values()),
        "signal": float(f"{instance.signal:.2g}"),
        "compared": compared,
    }


def _plans(instance: Instance, model: nn.Module) -> tuple[Row, Asked]:
    """The default plan and that of everything, and how the checks are to call the library.

    Inputs are given where a forward does not trace. Where nothing is expanded by default the checks
    ask for everything: expanding nothing would show nothing.
    """
    row: Row = {}
    convs = convs_of(model)
    start = time.perf_counter()
    plan = orepa.plan(model)
    row["plan_s"] = round(time.perf_counter() - start, 3)
    inputs = None
    if untraced := untraced_owners(model, is_leaf=is_leaf):  # only a recording can reach these
        row["untraced"] = len(untraced)
        try:
            plan = orepa.plan(model, inputs=instance.inputs())
            inputs = instance.inputs()
        except Exception as problem:  # a finding, not the end of the checks
            row["plan_error"] = described(problem)
    everything = orepa.plan(model, where="**", inputs=inputs)
    counted = count_plan(convs, plan)
    where = None if counted["expanded"] else "**"
    row |= {"where": where, "with_inputs": inputs is not None}
    row |= {"plan": counted, "plan_all": count_plan(convs, everything)}
    row["grown"] = [sum(edit.parameters[i] for edit in plan.of("expand").edits) for i in (0, 1)]
    return row, Asked(where, inputs is not None)


def _in_float64(instance: Instance, before: Findings, asked: Asked, limits: Limits) -> Row:
    """The checks again in float64, on a shortened model where the memory asks for it."""
    row: Row = {"float32": {name: check.error for name, check in before.checks.items()}}
    half = replace(limits, memory=limits.memory / 2)
    if not _fits(instance.stock(), half):
        instance = _shortened(instance)
        row["float64_reduced"] = instance.shortened
    given = [instance.model(torch.float64)]
    expected = observe(given[0], instance.inputs(torch.float64))
    findings = run_checks(instance, given, expected, asked=asked, dtype=torch.float64)
    times = {"seconds": before.seconds}
    return {**row, **findings.as_row(), **times, "precision": "float64"}


def status(row: Row) -> str:
    """pass: every check passed, the stock one perhaps refused, and every conv is accounted for."""
    outcomes = {name: check["outcome"] for name, check in row["checks"].items()}
    is_told = (
        not row["plan"]["silent"] and not row["plan_all"]["silent"] and "plan_error" not in row
    )
    if is_told and {*outcomes.values()} <= {"pass", "refused"}:
        return "pass"
    return "fail"
