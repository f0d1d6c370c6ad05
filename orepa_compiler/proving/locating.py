"""Finds the first torch module whose output is not what the reference gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.capture import ancestors
from orepa_compiler.compiler import collapse
from orepa_compiler.errors import NotRun, ReparamError
from orepa_compiler.export.run.runners import OnnxRunner
from orepa_compiler.export.run.tapping import onnx_outputs
from orepa_compiler.passes.collapse.folds import FoldGraph, fold_of
from orepa_compiler.planning import Edit, recorded_plans
from orepa_compiler.verification import NOISE_FACTOR, PRECISIONS, Report
from orepa_compiler.verification.divergence import (
    Divergence,
    first_divergence,
    module_outputs,
    taps_of,
)
from orepa_compiler.verification.evaluation import Batch, batches_of, evaluation_mode, own_dtype
from orepa_compiler.verification.nesting import map_tensors, tensors_in
from orepa_compiler.verification.probes import made_batches

Outputs = dict[str, tuple[str, Tensor]]

# A right module's small map is at times a little beyond a noise that is measured once; a fault is
# far beyond it. Among sixteen right models the worst came to 1.5 times the tolerance.
WIDE = 4.0

# Of a torch model, and of a file.
UNSEEN = (
    f"no module shows the fault: each one that both sides have is within {WIDE:g} times its "
    "tolerance, so the fault is smaller than that, or after the last of them"
)
UNSEEN_IN_FILE = (
    f"{UNSEEN}, or in the graph optimizations of onnxruntime, which are off in this search"
)


def locate(
    reference: nn.Module,
    candidate: nn.Module | OnnxRunner | Callable[..., Any],
    inputs: Any,
    *,
    precision: torch.dtype | None = None,
    factor: float = NOISE_FACTOR,
) -> Divergence | None:
    """Finds the first module of `reference` that the candidate computes otherwise, or None.

    max |found - truth| / max |truth|  >  WIDE * factor * max(noise, eps)

    Its truth is the reference's own forward in float64, and its noise that of the same forward in
    the candidate's precision. Where a collapse folded a norm into a conv, the two are one module,
    called by the conv's path and compared behind the norm. inputs: the first batch is looked at.

    Raises ReparamError where the candidate shows no modules: a function, or an engine; NotRun where
    the packages to run an ONNX file are not here.
    """
    batch = batches_of(inputs)[0]
    deploy, found = _found(reference, candidate, batch, precision)
    points = _comparable(reference, deploy)
    dtype = precision or own_dtype(reference) or torch.float32
    with evaluation_mode(reference):
        exact = _outputs_in(reference, batch, torch.float64)
        noisy = _outputs_in(reference, batch, dtype)
    given = {
        point.name: found[path]
        for point in points.values()
        if (path := next((path for path in point.places if path in found), None)) is not None
    }
    taps = taps_of(_named(exact, points), _named(noisy, points), given)
    divergence = first_divergence(taps, WIDE * factor)
    return divergence and replace(divergence, note=_rewritten(divergence.module, reference, deploy))


@dataclass(frozen=True)
class _Point:
    """A module of the reference whose output the candidate has too.

    name, kind: what it is called. places: the candidate's paths of the same value; the first that
    is there counts.
    """

    name: str
    places: tuple[str, ...]
    kind: str = ""


def _found(
    reference: nn.Module, candidate: Any, batch: Batch, precision: torch.dtype | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Finds a model whose record tells what was folded, and the candidate's outputs by module."""
    if isinstance(candidate, OnnxRunner):
        deploy = collapse(reference, inputs=batch)
        tensors = [_typed(tensor, precision) for tensor in tensors_in(batch)]
        return deploy, onnx_outputs(candidate.path, tensors)
    if isinstance(candidate, nn.Module):
        dtype = own_dtype(candidate)
        typed = map_tensors(batch, lambda tensor: _typed(tensor, dtype).clone())
        with evaluation_mode(candidate):
            outputs = module_outputs(candidate, typed)
        return candidate, {path: tensor for path, (_, tensor) in outputs.items()}
    raise ReparamError(
        "the candidate shows no modules, so the first wrong one cannot be found; compare the torch "
        "model or the ONNX file that it was made from"
    )


def _comparable(reference: nn.Module, deploy: nn.Module) -> dict[str, _Point]:
    """Pairs outputs by path in the reference; what a collapse took apart or moved is left out."""
    edits = _edits(reference, deploy)
    gone = {path for edit in edits for path in _unsettled(edit)}
    points = {p: _Point(p, (p,)) for p, _ in reference.named_modules() if p not in gone}
    for edit in edits:
        fold = fold_of(edit)
        if not isinstance(fold, FoldGraph):
            last = fold.modules[-1]
            # An Identity stands for the norm in torch, and nothing in an ONNX file.
            points[last] = _Point(edit.path, (last, edit.path), edit.before)
    return points


def _unsettled(edit: Edit) -> Iterator[str]:
    """Finds the modules whose own output an edit changes: those it folds, and some owners.

    Where a norm lies outside the container of its conv, that container's output is another too.
    """
    modules = fold_of(edit).modules
    common = set.intersection(*(set(ancestors(path)) for path in modules)) if modules else set()
    for path in modules:
        yield path
        yield from set(ancestors(path)) - common


def _rewritten(path: str, reference: nn.Module, deploy: nn.Module) -> str:
    """Finds what a collapse put before a module in its owner's forward, unseen in modules."""
    for edit in _edits(reference, deploy):
        fold = fold_of(edit)
        if not isinstance(fold, FoldGraph):
            continue
        if path == fold.owner or path.startswith(f"{fold.owner}."):
            return (
                f"The collapse rewrote {fold.owner}: {edit.before} became {edit.after}, before it"
            )
    return ""


def _edits(reference: nn.Module, deploy: nn.Module) -> list[Edit]:
    plans = recorded_plans(deploy)[len(recorded_plans(reference)) :]
    return [edit for plan in plans for edit in plan.of("collapse").edits]


def _named(outputs: Outputs, points: dict[str, _Point]) -> Outputs:
    return {
        points[path].name: (points[path].kind or kind, tensor)
        for path, (kind, tensor) in outputs.items()
        if path in points
    }


def _outputs_in(module: nn.Module, batch: Batch, dtype: torch.dtype) -> Outputs:
    typed = copy.deepcopy(module).to(dtype).eval()
    return module_outputs(typed, map_tensors(batch, lambda t: _typed(t, dtype).clone()))


def _typed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def explain(
    reference: Any,
    candidate: Any,
    inputs: Any,
    *,
    precision: torch.dtype | None = None,
    factor: float = NOISE_FACTOR,
) -> Divergence | str:
    """Gives what locate finds, or one line that says why nothing can be found."""
    if not isinstance(reference, nn.Module):
        return "the reference is no torch model: its modules cannot be told apart"
    try:
        found = locate(reference, candidate, inputs, precision=precision, factor=factor)
    except (ReparamError, NotRun) as error:
        return str(error)
    except Exception as error:  # a net that runs in float32 alone, or whose forward rejects a hook
        return f"the modules could not be run one by one ({type(error).__name__}: {error})"
    if found is not None:
        return found
    return UNSEEN_IN_FILE if isinstance(candidate, OnnxRunner) else UNSEEN


def explain_report(
    reference: Any, candidate: Any, inputs: Any, report: Report, *, precision: str | None = None
) -> Divergence | str:
    """Gives what explain finds on the batch of the report's worst row.

    inputs, precision: those that the report was made with.
    """
    if report.worst is None:
        return "no inputs were given"
    batches = batches_of(inputs)
    batches += made_batches(batches[0]).values()
    dtype = PRECISIONS[precision] if precision else None
    worst = batches[report.worst.batch]
    return explain(reference, candidate, worst, precision=dtype, factor=report.factor)
