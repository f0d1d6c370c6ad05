"""Compares two models: a strict verdict, with tolerances that are derived."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.verification.evaluation import (
    Outputs,
    Side,
    batches_of,
    evaluate,
    own_dtype,
    paired,
    refuse_unusable,
)
from orepa_compiler.verification.modes import (
    evaluation_mode,
    modules_in_train_mode,
    unchanged,
)
from orepa_compiler.verification.outputs.agreeing import agreements
from orepa_compiler.verification.outputs.blindness import blind_spots
from orepa_compiler.verification.outputs.comparison import (
    Comparison,
    compare,
    is_rounded,
    short,
    unfit,
)
from orepa_compiler.verification.outputs.rounding import NOISE_FACTOR
from orepa_compiler.verification.repeating import refuse_restless
from orepa_compiler.verification.samples import Samples, take_samples
from orepa_compiler.verification.truth import first_dtype
from orepa_compiler.verification.verdict import Report, Row

__all__ = ["NOISE_FACTOR", "Report", "Row", "Samples", "judge", "take_samples", "verify"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def verify_callables(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    inputs: Any,
    *,
    truth: nn.Module | None = None,
    precision: str | None = None,
    factor: float = NOISE_FACTOR,
    stress: bool = False,
) -> Report:
    """The verdict on `candidate`, truthy only when every output of every batch agrees.

    max |candidate - truth| / max |truth|  <=  factor * max(noise, eps)

    The truth is the reference evaluated in float64, and the noise is the reference's own error
    beside it. Modules are evaluated in eval mode without gradients, and are left as they were. An
    output that mixes quantities of different size is judged by the largest.

    reference, candidate: modules, or functions on tensors such as an ONNX session. inputs: a
    tensor, a tuple of positional arguments, or a list of such batches. truth: the module to
    evaluate in float64, where it is not the reference. precision: fp32, fp16 or bf16, where the
    candidate computes in another type than the reference; its floating inputs then come in that
    type, and the noise is that of the truth's module in that type. factor: how many times the noise
    a candidate's error may be. stress: compare also on inputs made from the first batch (random,
    constant, ten times and a hundredth of it); where the reference itself gives nothing finite
    there, a note says so, and no row.

    Raises NoVerdict where a side, called again on the first batch, gives other outputs, and names
    the first module that does. Raises ReparamError when there are no values to compare (a module or
    input on the meta device), when a side raises, when inputs are of the wrong kind or on another
    device than a module, and when the reference does not run in float64.
    """
    asked = _checked(precision, factor, truth)
    refuse_unusable("reference", reference, batches_of(inputs))
    refuse_unusable("candidate", candidate, batches_of(inputs))
    notes = tuple(_notes_before({"reference": reference, "candidate": candidate}))
    with evaluation_mode(reference, candidate, truth):
        samples = take_samples(reference, inputs, truth=truth, precision=asked, stress=stress)
        report = judge(samples, candidate, factor=factor)
    return replace(report, notes=(*notes, *report.notes))


def judge(
    samples: Samples, candidate: Callable[..., Any], *, factor: float = NOISE_FACTOR
) -> Report:
    """The verdict on `candidate` by samples that were taken of the reference before.

    Raises ReparamError when the candidate raises, or has no values; NoVerdict where it gives other
    outputs each time.
    """
    _checked(None, factor, None)
    refuse_unusable("candidate", candidate, samples.batches)
    with evaluation_mode(candidate), unchanged(candidate):
        side = _candidate_side(candidate, samples.precision)
        found = evaluate(side, samples.batches)
        refuse_restless(side, samples.batches, found)
    rows, compared, notes = [], [], list(samples.truth.notes)
    for output in _outputs(samples, found, factor):
        made = samples.made[output.batch]
        if isinstance(output, Comparison) and made and (reason := unfit(output)):
            notes.append(f"{output.name} was not compared on {made} inputs: {reason}")
            continue
        row = output if isinstance(output, Row) else compare(output)
        rows.append(replace(row, made=made))
        if isinstance(output, Comparison) and row.tolerance is not None and is_rounded(output):
            compared.append((row, output.truth))
    notes += blind_spots(compared)
    precision = samples.truth.noise_name or short(
        samples.precision or first_dtype(samples.expected)
    )
    # Below the noise of a float type there is nothing left to decide otherwise.
    agree = agreements(samples, rows, factor) if samples.truth.noise_name else ()
    return Report(tuple(rows), tuple(notes), precision, factor, agree)


def _checked(precision: str | None, factor: float, truth: Any) -> torch.dtype | None:
    if precision is not None and precision not in PRECISIONS:
        raise ReparamError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if not (isinstance(factor, (int, float)) and 1 <= factor < math.inf):
        raise ReparamError(f"factor={factor!r}: give a number from 1 up, in multiples of the noise")
    if truth is not None and not isinstance(truth, nn.Module):
        raise ReparamError(
            f"truth is a {type(truth).__name__}; it is evaluated in float64, so give an nn.Module"
        )
    return PRECISIONS[precision] if precision else None


def _notes_before(sides: dict[str, Any]) -> Iterator[str]:
    if sides["reference"] is sides["candidate"]:
        yield "reference and candidate are one object: it was compared with itself"
    for role, function in sides.items():
        if count := modules_in_train_mode(function):
            yield f"the {role} had {count} in train mode; it was compared in eval mode"


def _candidate_side(candidate: Any, asked: torch.dtype | None) -> Side:
    is_typed = asked is not None and isinstance(candidate, nn.Module)
    return Side("candidate", candidate, own_dtype(candidate) if is_typed else asked)


def _outputs(samples: Samples, found: list[Outputs], factor: float) -> Iterator[Comparison | Row]:
    """Every output of every batch: what is known of it, or the row that says it has no match."""
    right = samples.truth
    for index, ours in enumerate(samples.expected):
        theirs = paired(ours, found[index])
        exact, noisy = right.outputs[index], [outputs[index] for outputs in right.noisy]
        roles = {"reference": ours, "candidate": theirs, "truth in float64": exact}
        if noisy:
            roles[f"truth in {short(right.working)}"] = noisy[0]
        for name, leaf in ours.leaves.items():
            if name not in theirs.leaves:
                yield _unmatched(name, index, leaf, "candidate", theirs)
                continue
            if moved := _moved(name, ours, theirs):
                yield Row(name, index, *_kind(leaf), reason=moved)
                continue
            yield Comparison(
                name,
                index,
                leaf,
                theirs.leaves[name],
                exact.leaves[name],
                tuple(outputs.leaves[name] for outputs in noisy),
                right.working,
                samples.precision,
                {role: outputs.origin for role, outputs in roles.items()},
                factor,
                right.decisions_of(index).get(name),
                right.unclear_of(index).get(name),
                right.noise_name,
            )
        for name, leaf in theirs.leaves.items():
            if name not in ours.leaves:
                yield _unmatched(name, index, leaf, "reference", ours)
        if not ours.leaves and not theirs.leaves:
            yield Row(
                "output", index, (), "", reason="nothing to compare: no side returned a tensor"
            )


def _unmatched(name: str, batch: int, leaf: Any, role: str, other: Outputs) -> Row:
    its = f"its outputs are {', '.join(other.leaves)}" if other.leaves else "it returned nothing"
    return Row(name, batch, *_kind(leaf), reason=f"the {role} has no output {name}; {its}")


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), short(leaf.dtype)
    return (), type(leaf).__name__


def _moved(name: str, ours: Outputs, theirs: Outputs) -> str:
    """Why an output of two modules that has one name is another one; "" where it is not."""
    if not (ours.paths and theirs.paths):
        return ""
    mine, other = (
        dict(zip(outputs.leaves, outputs.paths, strict=True))[name] for outputs in (ours, theirs)
    )
    if mine == other or (ours.form, theirs.form) == ("fields", "sequence"):
        return ""
    return f"the candidate returns {name} under {_keys(other)}, the reference under {_keys(mine)}"


def _keys(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path) or "no key"
