"""Whether two models compute the same: a strict verdict, with tolerances that are derived."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.verification.blindness import blind_spots
from orepa_compiler.verification.comparison import NOISE_FACTOR, Comparison, compare, short
from orepa_compiler.verification.evaluation import (
    Outputs,
    Side,
    batches_of,
    evaluate,
    evaluation_mode,
    modules_in_train_mode,
    own_dtype,
    paired,
    refuse_unusable,
)
from orepa_compiler.verification.truth import Truth, first_dtype, truth_of
from orepa_compiler.verification.verdict import Report, Row

__all__ = ["NOISE_FACTOR", "Report", "Row", "verify"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def verify(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    inputs: Any,
    *,
    truth: nn.Module | None = None,
    precision: str | None = None,
    factor: float = NOISE_FACTOR,
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
    a candidate's error may be.

    Raises ReparamError when there are no values to compare (a module or input on the meta device),
    when a side raises, when inputs are of the wrong kind or on another device than a module, and
    when the reference does not run in float64.
    """
    batches = batches_of(inputs)
    asked = _checked(precision, factor, truth)
    sides = {"reference": reference, "candidate": candidate}
    for role, function in (sides if truth is None else {**sides, "truth": truth}).items():
        refuse_unusable(role, function, batches)
    notes = list(_notes_before(sides))
    with evaluation_mode(reference, candidate, truth):
        expected = evaluate(Side("reference", reference), batches)
        found = evaluate(_candidate_side(candidate, asked), batches)
        right = truth_of(reference, truth, expected, batches, asked)
    rows, compared = [], []
    for output in _outputs(expected, found, right, asked, factor):
        rows.append(output if isinstance(output, Row) else compare(output))
        if isinstance(output, Comparison) and rows[-1].tolerance is not None:
            compared.append((rows[-1], output.truth))
    notes += [*right.notes, *blind_spots(compared)]
    return Report(tuple(rows), tuple(notes), short(asked or first_dtype(expected)), factor)


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


def _outputs(
    expected: list[Outputs],
    found: list[Outputs],
    right: Truth,
    precision: torch.dtype | None,
    factor: float,
) -> Iterator[Comparison | Row]:
    """Every output of every batch: what is known of it, or the row that says it has no match."""
    for index, ours in enumerate(expected):
        theirs = paired(ours, found[index])
        exact, noisy = right.outputs[index], [outputs[index] for outputs in right.noisy]
        roles = {"reference": ours, "candidate": theirs, "truth in float64": exact}
        if noisy:
            roles[f"truth in {short(right.working)}"] = noisy[0]
        for name, leaf in ours.leaves.items():
            if name not in theirs.leaves:
                yield _unmatched(name, index, leaf, "candidate", theirs)
                continue
            yield Comparison(
                name,
                index,
                leaf,
                theirs.leaves[name],
                exact.leaves[name],
                tuple(outputs.leaves[name] for outputs in noisy),
                right.working,
                right.noise_scale,
                precision,
                {role: outputs.origin for role, outputs in roles.items()},
                factor,
            )
        for name, leaf in theirs.leaves.items():
            if name not in ours.leaves:
                yield _unmatched(name, index, leaf, "reference", ours)
        if not ours.leaves and not theirs.leaves:
            yield Row(
                "output", index, (), "", reason="nothing to compare: no side returned a tensor"
            )


def _unmatched(name: str, batch: int, leaf: Any, role: str, other: Outputs) -> Row:
    shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else ()
    dtype = short(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
    its = f"its outputs are {', '.join(other.leaves)}" if other.leaves else "it returned nothing"
    return Row(name, batch, shape, dtype, reason=f"the {role} has no output {name}; {its}")
