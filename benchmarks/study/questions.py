"""What is asked, as values: on Fashion-MNIST, and on 500 images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.study.arms import REDUCTIONS
from benchmarks.study.cells import Question
from orepa_compiler.blocks.catalogue import OREPA

PRESERVED = tuple(f"OREPA, preserve {factor:g}" for factor in REDUCTIONS)
DEFAULT = "OREPA, preserve 0.1"

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
        "The same comparison at four epochs.",
        ("ResNet-8", "VGG-7"),
        ("plain", DEFAULT),
        settings={f"width {n}": {**_TOO_SMALL, "epochs": 4, "width": n} for n in (4, 8, 16)},
        **_FASHION,
    ),
    "preconditioner": Question(
        "Is it a preconditioner?",
        "The plain net without a block, but with a block's first-order effect on each step.",
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
        "Kernels start as the plain net's; the other branches are scaled by 0 to 1. Also RepVGG.",
        _ONE_NET,
        ("plain", *PRESERVED, "RepVGG"),
    ),
    "branches": Question(
        "Which branches pay?",
        "One branch left out at a time (as in the paper's Table 2).",
        _ONE_NET,
        ("vector scaling", *_BRANCHES, "plain"),
        base="vector scaling",
    ),
    "scaling": Question(
        "Which scaling?",
        "Vector, scalar, none, and no norm after the sum (as in the paper's Table 3).",
        _ONE_NET,
        ("vector scaling", "scalar scaling", "no scaling", "no norm behind the sum"),
        base="vector scaling",
    ),
    "stem": Question(
        "The deep stem",
        "A 7 x 7 stem as the deep stem, or with the block that other k x k convs get.",
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
        "Can online blocks do what branch norms do?",
        "Normalized kernels, or branches scaled once from the data, compared with DBB.",
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
