"""What a gain at equal epochs is worth in time, where a step of one form costs more.

A form that costs c times a step is compared with the base at c times its epochs. That is read
between two budgets of the base, seed by seed, in proportion to the logarithm of the epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from statistics import mean, median

from benchmarks.study.cells import Cell, Question
from benchmarks.study.report import FEWEST, interval, markdown
from benchmarks.study.runs import Records
from benchmarks.study.statistics import Difference, paired

LARGE_NET_STEP = 1.10  # the default's step on a net of usual size: docs/performance.md

# epochs -> seed -> accuracy
Curve = Mapping[int, Mapping[int, float]]


@dataclass(frozen=True)
class Form:
    """An arm on a net over all budgets. step: seconds of the processor for an epoch, the median."""

    curve: Curve
    step: float


def form(cells: list[Cell], records: Records) -> Form | None:
    """What is known of an arm; None where no budget of it was measured."""
    curve: dict[int, dict[int, float]] = {}
    steps: list[float] = []
    for cell in cells:
        for rate in cell.rates(records):
            known = [run for run in cell.measured(rate) if run in records.known]
            if len(known) < FEWEST:
                continue
            curve[known[0].epochs] = {run.seed: records.accuracy(run) for run in known}
            steps += [records.known[run]["fit_seconds"] / run.epochs for run in known]
    return Form(curve, median(steps)) if curve else None


def at_equal_time(own: Form, base: Form, epochs: int, cost: float) -> Difference | None:
    """own at so many epochs less base at cost times as many; None beyond the base's budgets."""
    reached = _between(base.curve, epochs * cost)
    pairs = [
        (accuracy, reached[seed]) for seed, accuracy in own.curve[epochs].items() if seed in reached
    ]
    return paired(*zip(*pairs, strict=True)) if len(pairs) >= FEWEST else None


def _between(curve: Curve, epochs: float) -> Mapping[int, float]:
    """seed -> accuracy at a number of epochs that need not be a budget; {} outside all of them."""
    if epochs in curve:
        return curve[int(epochs)]
    lower, upper = [n for n in curve if n < epochs], [n for n in curve if n > epochs]
    if not lower or not upper:
        return {}
    low, high = max(lower), min(upper)
    part = log2(epochs / low) / log2(high / low)
    both = curve[low].keys() & curve[high].keys()
    return {seed: (1 - part) * curve[low][seed] + part * curve[high][seed] for seed in both}


def epochs_for(own: Form, accuracy: float) -> float | None:
    """How many epochs its mean needs for an accuracy; None outside its budgets."""
    means = sorted((epochs, mean(each.values())) for epochs, each in own.curve.items())
    for (low, worse), (high, better) in pairwise(means):
        if worse <= accuracy <= better and worse < better:
            return low * (high / low) ** ((accuracy - worse) / (better - worse))
    return None


HEADS = (
    "net",
    "epochs",
    "at equal epochs",
    f"at equal time, if a step takes {LARGE_NET_STEP:.2f}",
    "at equal time, as measured here",
    "step / plain's, as measured here",
    "epochs for plain's result",
)
MEANS = (
    "The default minus plain, with the 95 % interval, where plain has trained for as many epochs, "
    "or for as long. For equal time,\nplain's accuracy is interpolated between two of its budgets, "
    "linearly in the logarithm of the epochs. The last column says\nhow many epochs the default "
    "needs to reach plain's mean at that budget. Steps are measured here on tiny nets and one "
    "core,\nwhere computing the kernels takes as long as the convs do."
)


def time_section(question: Question, records: Records) -> str:
    """The same gains in time, as a part of the page; empty where nothing was compared."""
    if not (rows := time_rows(question, records)):
        return ""
    return "\n".join(("#### In time", "", MEANS, "", markdown([HEADS, *rows]), ""))


def time_rows(question: Question, records: Records) -> list[tuple[str, ...]]:
    """For each net and budget: the second arm less the first, at equal epochs and at equal time."""
    first, second = question.arms
    rows: list[tuple[str, ...]] = []
    for net in question.nets:
        cells = [cell for cell in question.cells() if cell.net == net]
        base, own = (
            form([cell for cell in cells if cell.arm == arm], records) for arm in (first, second)
        )
        if base and own:
            rows += [_row(net, own, base, n) for n in sorted(own.curve) if n in base.curve]
    return rows


def _row(net: str, own: Form, base: Form, epochs: int) -> tuple[str, ...]:
    here = own.step / base.step
    needed = epochs_for(own, mean(base.curve[epochs].values()))
    costs = (1.0, LARGE_NET_STEP, here)
    gains = [at_equal_time(own, base, epochs, cost) for cost in costs]
    return (
        net,
        str(epochs),
        *(f"{gain.mean:+.2f} ({interval(gain)})" if gain else "-" for gain in gains),
        f"{here:.2f}",
        "-" if needed is None else f"{needed:.1f}",
    )
