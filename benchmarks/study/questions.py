"""The questions, as the runs that answer them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from statistics import mean
from typing import Any

from benchmarks.study.arms import REDUCTIONS
from benchmarks.study.runs import Records, Run
from orepa_compiler.blocks.catalogue import OREPA

# A rate is chosen on other splits than those that are compared, and never on the test images.
TUNING_SEEDS = (100, 101, 102)
SEEDS = tuple(range(10))
RATES = (0.03, 0.1, 0.3, 1.0)
WIDER = (0.001, 0.003, 0.01, *RATES, 3.0, 10.0)

PRESERVED = tuple(f"OREPA, preserve {factor:g}" for factor in REDUCTIONS)
DEFAULT = "OREPA, preserve 0.1"


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
    """The runs that can be made now: those that tune, then those at the rates that are known."""
    cells = list(question.cells())
    tuning = [run for cell in cells for run in cell.tuning(records)]
    measured = [
        run for cell in cells for rate in cell.rates(records) for run in cell.measured(rate)
    ]
    # seed by seed: where a study is stopped, the runs that it made are pairs
    return records.missing([*tuning, *sorted(measured, key=lambda run: run.seed)])


def progress(question: Question, records: Records) -> tuple[int, int]:
    """How many runs are made, of how many."""
    cells = list(question.cells())
    rates = 1 if question.is_tuned else len(question.rates)
    total = sum(len(cell.tuning(records)) + rates * len(SEEDS) for cell in cells)
    known = {run for cell in cells for run in cell.tuning(records)}
    known |= {run for cell in cells for rate in cell.rates(records) for run in cell.measured(rate)}
    return len(known & records.known.keys()), total


_ONE_NET = ("ResNet-8",)
_BRANCHES = tuple(f"without {name}" for name in OREPA.branches if name != "origin")

# The regime in which a net is too small for its images: none of these fits what it trains on.
_TOO_SMALL: dict[str, Any] = {"train": 60_000, "batch": 128, "width": 4}
_FASHION: dict[str, Any] = {
    "data": "fashion",
    "rates": (0.1, 0.3, 1.0),
    "margin": 0.5,
    "tuned_on": {"train": 50_000},
}
_ADAMW: dict[str, Any] = {"optimizer": "AdamW", "weight_decay": 0.01}


def _budgets(*every: int) -> dict[str, Mapping[str, Any]]:
    return {_epochs(n): {**_TOO_SMALL, "epochs": n} for n in every}


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"


FASHION_QUESTIONS: dict[str, Question] = {
    "budget": Question(
        "Where does it help: at which budget?",
        "Plain and the default on nets of width 4, too small for the 60,000 images they see.",
        ("ResNet-8", "VGG-7", "MobileNet-7", "Bottleneck-11"),
        ("plain", DEFAULT),
        settings=_budgets(1, 2, 4, 8, 16, 32),
        is_over_budgets=True,
        **_FASHION,
    ),
    "width": Question(
        "At which width?",
        "The same, four epochs.",
        ("ResNet-8", "VGG-7"),
        ("plain", DEFAULT),
        settings={f"width {n}": {**_TOO_SMALL, "epochs": 4, "width": n} for n in (4, 8, 16)},
        **_FASHION,
    ),
    "preconditioner": Question(
        "Is it a preconditioner?",
        "The plain net with the block's first-order effect on a step, and no block.",
        _ONE_NET,
        ("plain", DEFAULT, "gradient", "gradient, diagonal"),
        settings=_budgets(1, 4),
        **_FASHION,
    ),
    "adamw": Question(
        "And with AdamW?",
        "Each arm at its own rate.",
        _ONE_NET,
        ("plain", DEFAULT),
        settings={_epochs(n): {**_TOO_SMALL, **_ADAMW, "epochs": n} for n in (1, 4)},
        **{**_FASHION, "rates": (0.003, 0.01, 0.03)},
    ),
    "blocks": Question(
        "Which block?",
        "Four epochs, every block with its own start.",
        ("ResNet-8", "VGG-7"),
        (
            *("plain", DEFAULT, "OREPA, paper", "OREPA, branch norms", "DBB", "RepVGG"),
            *("MobileOne", "ACNet", "ExpandNet", "DO-Conv"),
        ),
        settings=_budgets(4),
        **_FASHION,
    ),
}

SMALL_QUESTIONS: dict[str, Question] = {
    "forms": Question(
        "Does it help?",
        "Plain, OREPA with both starts, and the offline block, at equal inference cost.",
        ("ResNet-8", "VGG-7", "MobileNet-7", "Bottleneck-11", "ResNet-14"),
        ("plain", "OREPA, paper", DEFAULT, "DBB"),
    ),
    "start": Question(
        "How small should the other branches start?",
        "The plain net's kernels kept; the other branches' scaling times 0 to 1. Beside it RepVGG.",
        _ONE_NET,
        ("plain", *PRESERVED, "RepVGG"),
    ),
    "branches": Question(
        "Which branches pay?",
        "One branch left out at a time (Table 2 in small).",
        _ONE_NET,
        ("vector scaling", *_BRANCHES, "plain"),
        base="vector scaling",
    ),
    "scaling": Question(
        "Which scaling?",
        "Vector, scalar, none, and no norm behind the sum (Table 3).",
        _ONE_NET,
        ("vector scaling", "scalar scaling", "no scaling", "no norm behind the sum"),
        base="vector scaling",
    ),
    "stem": Question(
        "The deep stem",
        "For a 7 x 7 stem: the deep stem, or the block of every k x k conv.",
        ("ResNet-8, 7 x 7 stem",),
        ("plain", "deep stem", "stem as k x k"),
    ),
    "straight": Question(
        "Which block without residual connections?",
        "Explicit branches, each with a norm (OREPA_VGG), or all in one conv, as in other nets.",
        ("VGG-7", "VGG-13"),
        ("plain", DEFAULT, "OREPA, one conv"),
    ),
    "rates": Question(
        "At which learning rate?",
        "Every arm at every rate.",
        _ONE_NET,
        ("plain", "OREPA, paper", DEFAULT, "DBB"),
        rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        is_tuned=False,
    ),
    "decay": Question(
        "Weight decay on the scaling layers",
        "With and without, at two strengths.",
        _ONE_NET,
        ("OREPA, paper", DEFAULT),
        base_setting="0.0001, scaling does not decay",
        settings={
            f"{decay:g}, scaling {'decays' if decays else 'does not decay'}": {
                "weight_decay": decay,
                "scaling_decays": decays,
            }
            for decay in (1e-4, 1e-3)
            for decays in (False, True)
        },
    ),
    "warmup": Question(
        "Warm-up",
        "None, or five of twenty epochs.",
        _ONE_NET,
        ("plain", "OREPA, paper", DEFAULT),
        settings={"none": {}, "5 epochs": {"warmup": 5}},
    ),
    "epochs": Question(
        "How long?",
        "10, 20 and 40 epochs.",
        _ONE_NET,
        ("plain", "OREPA, paper", DEFAULT, "DBB"),
        settings={f"{epochs} epochs": {"epochs": epochs} for epochs in (10, 20, 40)},
    ),
    "norms": Question(
        "Can online training have what branch norms give?",
        "Kernels normalized, or scaled once from the data, beside DBB.",
        ("ResNet-8", "VGG-7"),
        (
            *("plain", "vector scaling", "DBB", "normalized", "standardized"),
            *("normalized, preserve", "scaled from data"),
        ),
    ),
    "finetune": Question(
        "Fine-tuning from ImageNet",
        "EfficientNet-Lite0 from its pretrained weights, five epochs.",
        ("EfficientNet-Lite0",),
        ("plain", "OREPA, preserve 0", DEFAULT, "OREPA, preserve 0.3"),
        rates=(0.003, 0.01, 0.03, 0.1),
        settings={"5 epochs": {"epochs": 5}},
    ),
    "digits": Question(
        "Other images",
        "The digits of scikit-learn, 8 x 8.",
        _ONE_NET,
        ("plain", "OREPA, paper", DEFAULT, "DBB"),
        data="digits",
    ),
}

QUESTIONS: dict[str, Question] = {**FASHION_QUESTIONS, **SMALL_QUESTIONS}
