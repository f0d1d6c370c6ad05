"""Holds what a reference gives on some inputs, to judge a candidate on any machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.verification.evaluation import (
    Batch,
    Outputs,
    Side,
    batches_of,
    evaluate,
    refuse_unusable,
)
from orepa_compiler.verification.modes import evaluation_mode, unchanged
from orepa_compiler.verification.nesting import is_comparable
from orepa_compiler.verification.probes import made_batches
from orepa_compiler.verification.repeating import refuse_restless
from orepa_compiler.verification.truth import Truth, truth_of


@dataclass(frozen=True)
class Samples:
    """Batches, and the reference's outputs on them.

    made: a batch's name (random, constant, large, small) where it was made, and "" where it was
    given. precision: the dtype that the candidate is to compute in; None for the reference's.
    """

    batches: list[Batch]
    made: list[str]
    expected: list[Outputs]
    truth: Truth
    precision: torch.dtype | None

    def lean(self) -> Samples:
        """The same verdicts from less: of several noisy outputs, the worst alone."""
        worst = [
            _worst(exact, [outputs[index] for outputs in self.truth.noisy])
            for index, exact in enumerate(self.truth.outputs)
        ]
        noisy = [worst] if self.truth.noisy else []
        return replace(self, truth=replace(self.truth, noisy=noisy))


def take_samples(
    reference: Callable[..., Any],
    inputs: Any,
    *,
    truth: nn.Module | None = None,
    precision: torch.dtype | None = None,
    stress: bool = False,
) -> Samples:
    """The reference's outputs, their truth in float64 and their noise; arguments as in verify.

    Raises ReparamError and NoVerdict as verify does.
    """
    batches = batches_of(inputs)
    sides = {"reference": reference, "truth": truth if truth is not None else reference}
    for role, function in sides.items():
        refuse_unusable(role, function, batches)
    made = made_batches(batches[0]) if stress and batches else {}
    names = [""] * len(batches) + list(made)
    batches = [*batches, *made.values()]
    with evaluation_mode(reference, truth), unchanged(reference, truth):
        side = Side("reference", reference)
        expected = evaluate(side, batches)
        refuse_restless(side, batches, expected)
        right = truth_of(reference, truth, expected, batches, precision)
    return Samples(batches, names, expected, right, precision)


def _worst(exact: Outputs, noisy: list[Outputs]) -> Outputs:
    """Of each output, the values that lie farthest from the truth."""
    if not noisy:
        return exact
    leaves = {}
    for name, right in exact.leaves.items():
        values = [outputs.leaves[name] for outputs in noisy]
        leaves[name] = max(values, key=lambda value: _distance(value, right))
    return replace(noisy[0], leaves=leaves)


def _distance(values: Any, right: Any) -> float:
    comparable = is_comparable(values) and is_comparable(right) and values.shape == right.shape
    if not comparable or not right.numel():
        return float("inf")
    difference: Tensor = (values.double() - right.double()).abs().nan_to_num(nan=float("inf"))
    return float(difference.max())
