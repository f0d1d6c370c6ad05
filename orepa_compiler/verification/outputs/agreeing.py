"""Counts how often a candidate decides as the truth does: the top-1 of all that was given.

    disagreement  <=  factor * max(disagreement of the noise, one position)

It is asked where the noise is so large (that of int8) that an output within it may still decide
otherwise more often than it has to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from orepa_compiler.verification.nesting import is_comparable
from orepa_compiler.verification.outputs.compared_output import wide
from orepa_compiler.verification.samples import Samples
from orepa_compiler.verification.verdict import Agreement, Row


def agreements(samples: Samples, rows: Sequence[Row], factor: float) -> tuple[Agreement, ...]:
    """Of each output with a top-1, how often it is the truth's, on the batches that were given."""
    given = [row for row in rows if not row.made and row.top1 is not None]
    lean = samples.lean()
    if not lean.truth.noisy:
        return ()
    found = []
    for name in dict.fromkeys(row.name for row in given):
        counts = _Counts()
        for row in (row for row in given if row.name == name):
            truth = lean.truth.outputs[row.batch].leaves[name]
            noisy = lean.truth.noisy[0][row.batch].leaves[name]
            counts = counts.plus(row.top1 or 0.0, *disagreements(noisy, truth))
        found.append(counts.agreement(name, factor))
    return tuple(found)


@dataclass(frozen=True)
class _Counts:
    positions: int = 0
    wrong: float = 0.0
    expected: float = 0.0

    def plus(self, top1: float, noisy: int, positions: int) -> _Counts:
        return _Counts(
            self.positions + positions,
            self.wrong + (1 - top1) * positions,
            self.expected + noisy,
        )

    def agreement(self, name: str, factor: float) -> Agreement:
        count = max(self.positions, 1)
        allowed = factor * max(self.expected, 1.0)
        reason = ""
        if self.wrong > allowed:
            reason = (
                f"{name}: another top-1 at {self.wrong:.0f} of {self.positions} positions of the "
                f"inputs, where the noise alone comes to {self.expected:.0f}"
            )
        share, expected = 1 - self.wrong / count, 1 - self.expected / count
        return Agreement(name, self.positions, share, expected, reason)


def disagreements(values: Tensor, truth: Tensor) -> tuple[int, int]:
    """At how many positions another entry along axis 1 comes first, and of how many."""
    if not is_comparable(values) or values.shape != truth.shape:
        return truth.numel() // truth.shape[1], truth.numel() // truth.shape[1]
    chosen = wide(values).argmax(1, keepdim=True)
    exact = wide(truth)
    wrong = exact.amax(1, keepdim=True) > exact.gather(1, chosen)
    return int(wrong.sum()), wrong.numel()
