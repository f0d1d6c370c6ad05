"""One model's row: plan, expand, collapse, compare, and export beside torch's own exporter."""

from __future__ import annotations

import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

import orepa_compiler as orepa
from benchmarks.libraries.catalogue import Entry, entries, outputs_of
from benchmarks.zoo.building import Subject
from benchmarks.zoo.checks import described
from benchmarks.zoo.counting import convs_of, count_plan, watching_norms
from benchmarks.zoo.examining import Limits, Row
from orepa_compiler.algebra.classifiers import is_batch_norm

TOLERANCE = 1e-3  # relative to the largest output, in float32, of random weights
_SPREAD = 0.5  # of the random statistics around those of a fresh norm


def examine(subject: Subject, limits: Limits, *, exports: bool = True) -> Row:
    """The row of one model. What any stage raises is in the row."""
    start = time.perf_counter()
    row: Row = {"library": subject.library, "name": subject.name, "family": subject.family}
    try:
        row |= _examined(entries()[subject.key], exports)
    except orepa.ReparamError as problem:
        row |= {"status": "refused", "why": described(problem)}
    except Exception as problem:  # a row, whatever happens: a model is never left out in silence
        row |= {"status": "error", "why": described(problem)}
    row["total_s"] = round(time.perf_counter() - start, 2)
    return row


def _examined(entry: Entry, exports: bool) -> Row:
    model, inputs = entry.make(), entry.inputs()
    _randomise(model)
    convs = convs_of(model)
    row: Row = {"class": type(model).__name__, "convs": len(convs.all)}
    row["spatial"] = len(convs.spatial)
    if not convs.all:
        return {**row, "status": "no conv"}
    with torch.no_grad(), watching_norms(model) as norms:
        expected = outputs_of(model(*deepcopy(inputs)))
    row |= {"norms": norms.total, "norms_behind_conv": len(norms.behind)}
    plan = orepa.plan(model, inputs=_given(inputs))
    row["plan"] = count_plan(convs, plan)
    big = orepa.expand(model, inputs=_given(inputs), plan=plan).eval()
    small = orepa.collapse(big, inputs=_given(inputs))
    row["errors"] = {
        name: _error(expected, made, inputs)
        for name, made in (("expand", big), ("collapse", small))
    }
    left = {path for path, module in small.named_modules() if is_batch_norm(module)}
    row["norms_left"] = sorted(left & norms.behind)
    if exports:
        row |= {"torch_exports": _torch_exports(model, inputs), "exports": _exports(small, inputs)}
    return {**row, "status": _status(row)}


def _given(inputs: tuple[Any, ...]) -> Any:
    """The inputs of a verb, as it takes them; new ones, for a forward may write over its input."""
    made = deepcopy(inputs)
    return made if len(made) > 1 else made[0]


@torch.no_grad()
def _error(expected: list[torch.Tensor], made: nn.Module, inputs: tuple[Any, ...]) -> float:
    """The largest difference over the largest output, for the worst output."""
    found = outputs_of(made(*deepcopy(inputs)))
    if len(found) != len(expected):
        return float("inf")
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(found, expected, strict=True)
        if b.is_floating_point() and b.numel()
    ]
    return max(errors, default=float("inf"))


def _exports(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """ "" where the export is written and passes its gates, or what it says.

    As torch's own does by default, for one batch size where the forward holds for no other.
    """
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        for dynamic in (True, False):
            file = Path(folder) / f"{dynamic}.onnx"
            try:
                orepa.export_onnx(model, _given(inputs), file, dynamic_batch=dynamic)
            except Exception as problem:
                said = described(problem)
                if "dynamic_batch=False" not in said:
                    return said
            else:
                return ""
    return said


def _torch_exports(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether torch's own exporter takes the stock model."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.onnx.export(
                model, deepcopy(inputs), Path(folder) / "model.onnx", dynamo=True, verbose=False
            )
        except Exception:
            return False
    return True


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Random statistics for the norms: with fresh ones a forgotten mean does not show."""
    for module in model.modules():
        if is_batch_norm(module) and isinstance(module.running_mean, torch.Tensor):
            module.running_mean.uniform_(-_SPREAD, _SPREAD)
            module.running_var.uniform_(1 - _SPREAD, 1 + _SPREAD)  # type: ignore[operator,union-attr]


def _status(row: Row) -> str:
    """pass: the outputs agree, every conv is accounted for, and what torch exports is exported."""
    agree = max(row["errors"].values()) <= TOLERANCE
    is_exported = not row.get("torch_exports") or not row["exports"]
    return "pass" if agree and is_exported and not row["plan"]["silent"] else "fail"
