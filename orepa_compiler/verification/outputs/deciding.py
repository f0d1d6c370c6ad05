"""Compares an output that is decided and not rounded: masks, class ids, counts.

It must be the truth's exactly wherever the reference decides clearly. Where it does not, any value
will do whose decision is as near as rounding is large:

    margin  <=  NOISE_FACTOR * max(noise, eps)

margin: between the two values that are compared, or half of that between the scores of the two
indices, in units of the largest. noise: of these values in the working precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orepa_compiler.verification.outputs.compared_output import Comparison
from orepa_compiler.verification.outputs.rounding import MAX_TOLERANCE, too_noisy
from orepa_compiler.verification.verdict import Row


def decide(output: Comparison) -> Row:
    """The row of such an output: error and tolerance are shares of its entries.

    error: that differ from the truth. noise: in which the reference does. tolerance: that may.
    """
    margins, limit, reason = None, 0.0, ""
    if output.decision is not None:
        eps = torch.finfo(output.working).eps
        limit = min(output.factor * max(output.decision.noise, eps), MAX_TOLERANCE)
        margins = output.decision.margins(output.candidate, output.truth)
        reason = too_noisy(output.decision.noise, output)
    wrong = _wrong(output, output.candidate, limit)
    off = _wrong(output, output.reference, limit)
    reason = reason or _said(output, wrong, margins, limit) or _reference_off(off)
    error, noise = (_share(value != output.truth) for value in (output.candidate, output.reference))
    allowed = 0.0 if reason else error
    return output.row(reason, error=error, noise=noise, tolerance=allowed)


def _wrong(output: Comparison, found: Tensor, limit: float) -> Tensor:
    """Where a value is another than the truth's, and is clearly so."""
    differs: Tensor = found != output.truth
    if output.decision is not None:
        return differs & (output.decision.margins(found, output.truth) > limit)
    return differs if output.unclear is None else differs & ~output.unclear


def _said(output: Comparison, wrong: Tensor, margins: Tensor | None, limit: float) -> str:
    if not wrong.any():
        return ""
    # The clearest of them: inf where an index is none.
    order = (
        wrong.double() if margins is None else margins.where(wrong, torch.tensor(-1.0).to(margins))
    )
    place = torch.unravel_index(order.argmax(), order.shape)
    where = tuple(int(axis) for axis in place)
    text = (
        f"{int(wrong.sum())} of {wrong.numel()} values differ where the reference decides "
        f"clearly; at {where}: {output.candidate[place].item()}, the truth is "
        f"{output.truth[place].item()}"
    )
    if margins is None:
        return text
    return f"{text}, by {float(margins[place]):.1e} of what it is decided on, above {limit:.1e}"


def _reference_off(wrong: Tensor) -> str:
    if not wrong.any():
        return ""
    return (
        f"the reference itself differs from the truth in {int(wrong.sum())} of {wrong.numel()} "
        "values that are decided clearly: it is another function, or computes in a lower precision"
    )


def _share(values: Tensor) -> float:
    return float(values.double().mean())
