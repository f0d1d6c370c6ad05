"""A question as cells, an arm on a net in a setting, and the runs that each needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from statistics import mean
from typing import Any

from benchmarks.study.runs import Records, Run

# A rate is chosen on other splits than those that are compared, and never on the test images.
TUNING_SEEDS = (100, 101, 102)
SEEDS = tuple(range(10))
RATES = (0.03, 0.1, 0.3, 1.0)
WIDER = (0.001, 0.003, 0.01, *RATES, 3.0, 10.0)


@dataclass(frozen=True)
class Question:
    """Which arms, on which nets.

    base: the arm that the others are compared with, in the same setting; or base_setting: each arm
    with itself in that one. rates: what each arm chooses its learning rate from, all with the same
    budget, and the next ones beside them while the best is the last of them; where is_tuned is
    False, what each arm is shown at. margin: points behind the best, in the mean over the seeds so
    far, from which a rate is tuned no further. tuned_on: fields of a Run that differ while a rate
    is chosen. settings: name -> the fields of a Run that differ. is_over_budgets: whether these
    are numbers of epochs, to be drawn and to be compared at equal time too.
    """

    title: str
    asks: str
    nets: tuple[str, ...]
    arms: tuple[str, ...]
    base: str = "plain"
    base_setting: str | None = None
    rates: tuple[float, ...] = RATES
    is_tuned: bool = True
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    is_over_budgets: bool = False
    data: str = "mnist"
    margin: float = inf
    tuned_on: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> Iterator[Cell]:
        """What is compared: each arm on each net in each setting."""
        for net in self.nets:
            for setting, fields in self.settings.items():
                for arm in self.arms:
                    yield Cell(self, net, setting, {"data": self.data, "net": net, **fields}, arm)


@dataclass(frozen=True)
class Cell:
    """One arm on one net in one setting."""

    question: Question
    net: str
    setting: str
    fields: Mapping[str, Any]
    arm: str

    def tuning(self, records: Records) -> list[Run]:
        """The runs that choose the rate, as far as they are known to be needed."""
        tried = self._tried(records)
        return self._race(tried, records)[0] if tried else []

    def rates(self, records: Records) -> tuple[float, ...]:
        """The rates that it is measured at: the chosen one, or all; empty while it is tuned."""
        if not self.question.is_tuned:
            return self.question.rates
        runs, left = self._race(self._tried(records), records)
        return () if records.missing(runs) else left

    def _tried(self, records: Records) -> tuple[float, ...]:
        """No arm is judged at the edge of what was tried: the best rate has one on either side."""
        if not self.question.is_tuned:
            return ()
        low, high = (
            WIDER.index(rate) for rate in (self.question.rates[0], self.question.rates[-1])
        )
        while True:
            tried = WIDER[low : high + 1]
            runs, (best, *_) = self._race(tried, records)
            if records.missing(runs):
                return tried
            if best == tried[0] and low > 0:
                low -= 1
            elif best == tried[-1] and high < len(WIDER) - 1:
                high += 1
            else:
                return tried

    def _race(
        self, tried: tuple[float, ...], records: Records
    ) -> tuple[list[Run], tuple[float, ...]]:
        """The runs that choose among the rates, and the rates that are left: one at the end.

        A rate that is behind the best by more than the question's margin runs on no further seed.
        """
        runs: list[Run] = []
        left = tried
        for count in range(1, len(TUNING_SEEDS) + 1):
            if len(left) == 1 < count:
                break
            own = {rate: self._tuned(rate, TUNING_SEEDS[:count]) for rate in left}
            runs += [each[-1] for each in own.values()]
            if records.missing(runs):
                return runs, left
            means = {rate: mean(map(records.accuracy, each)) for rate, each in own.items()}
            best = max(means.values())
            left = tuple(rate for rate in left if means[rate] >= best - self.question.margin)
        return runs, (max(left, key=means.__getitem__),)

    def _tuned(self, rate: float, seeds: tuple[int, ...]) -> list[Run]:
        fields = {"rate": rate, "held": "validation", **self.question.tuned_on}
        return [self._run(seed=seed, **fields) for seed in seeds]

    def base(self) -> Cell:
        """What it is compared with."""
        question = self.question
        if question.base_setting is None:
            return replace(self, arm=question.base)
        fields = {"data": question.data, "net": self.net}
        fields |= question.settings[question.base_setting]
        return replace(self, setting=question.base_setting, fields=fields)

    def measured(self, rate: float) -> list[Run]:
        """The paired runs at a rate."""
        return [self._run(rate=rate, seed=seed) for seed in SEEDS]

    def _run(self, **fields: Any) -> Run:
        return Run(arm=self.arm, **{**self.fields, **fields})


def needed(question: Question, records: Records) -> list[Run]:
    """The runs that can be made now: those that tune; once all are there, those that compare."""
    cells = list(question.cells())
    tuning = [run for cell in cells for run in cell.tuning(records)]
    measured = [
        run for cell in cells for rate in cell.rates(records) for run in cell.measured(rate)
    ]
    # seed by seed: where a study is stopped, the runs that it made are pairs
    return records.missing(tuning) or records.missing(sorted(measured, key=lambda run: run.seed))


def progress(question: Question, records: Records) -> tuple[int, int]:
    """How many runs are made, of how many."""
    cells = list(question.cells())
    rates = 1 if question.is_tuned else len(question.rates)
    total = sum(len(cell.tuning(records)) + rates * len(SEEDS) for cell in cells)
    known = {run for cell in cells for run in cell.tuning(records)}
    known |= {run for cell in cells for rate in cell.rates(records) for run in cell.measured(rate)}
    return len(known & records.known.keys()), total
