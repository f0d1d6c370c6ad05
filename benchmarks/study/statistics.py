"""What paired runs say: a mean difference and its 95 % confidence interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """mean of (own - base) over n seeds; low and high: the interval of that mean (Student's t)."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """Whether the interval leaves out 0."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


def paired(own: Sequence[float], base: Sequence[float]) -> Difference:
    """The difference of two arms, seed by seed.

    Raises ValueError for fewer than two pairs, or lists that differ in length.
    """
    if len(own) != len(base) or len(own) < 2:
        raise ValueError(f"{len(own)} and {len(base)} runs; give the same seeds, at least two")
    differences = [left - right for left, right in zip(own, base, strict=True)]
    mean, n = statistics.mean(differences), len(differences)
    half = statistics.stdev(differences) / sqrt(n) * t.ppf((1 + CONFIDENCE) / 2, n - 1)
    return Difference(mean, mean - half, mean + half, n)
