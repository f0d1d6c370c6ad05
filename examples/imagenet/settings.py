"""The settings of a run: the paper's, unless they are given."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from math import cos, pi
from pathlib import Path
from typing import get_type_hints

from networks import FORMS, NAMES

# What a run must share with the checkpoint that it goes on from.
IDENTITY = ("arch", "form", "epochs", "warmup", "batch", "lr", "weight_decay", "seed", "size")


@dataclass(frozen=True)
class Settings:
    """Hu et al. 2022, Sec. 4.1: SGD, 120 epochs, 5 of them linear warm-up, cosine, batch 256."""

    data: Path | None = None
    output: Path = Path("imagenet-output")
    arch: str = "ResNet-18"
    form: str = "orepa"
    epochs: int = 120
    warmup: float = 5.0
    batch: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    groups: str = "reference"
    size: int = 224
    seed: int = 0
    accumulate: int = 1
    amp: str = "none"
    compile: bool = False
    two_phase: bool = False
    workers: int = 8
    synthetic: int = 0
    tensorboard: bool = False

    def rate(self, step: int, steps: int) -> float:
        """The part of the learning rate in a step, `steps` to an epoch: warm-up, then cosine."""
        warmup, total = self.warmup * steps, self.epochs * steps
        if step < warmup:
            return (step + 1) / warmup
        return (1 + cos(pi * (step - warmup) / max(total - warmup, 1))) / 2


HELP = {
    "data": "a folder with train/ and val/: in each a folder for each class, or shards (*.tar)",
    "output": "where checkpoints, logs and the exported model go; a run that is there goes on",
    "warmup": "epochs of linear warm-up",
    "batch": "images to a step, over all processes and micro-batches",
    "groups": "which parameters decay: as the authors' code, as recommended, or all",
    "accumulate": "micro-batches to a step",
    "amp": "autocast to this type; fp16 with a GradScaler",
    "compile": "torch.compile the model",
    "two_phase": "make kernels once a step (form orepa): less memory, less traffic",
    "synthetic": "train on this many synthetic images instead of data",
    "tensorboard": "log for TensorBoard beside the CSV file",
}
CHOICES = {
    "arch": NAMES,
    "form": FORMS,
    "groups": ("reference", "recommended", "all"),
    "amp": ("none", "bf16", "fp16"),
}


def parse(arguments: list[str] | None = None) -> Settings:
    """The settings of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    types = get_type_hints(Settings)
    for field in fields(Settings):
        flag, text = f"--{field.name.replace('_', '-')}", HELP.get(field.name, field.name)
        if types[field.name] is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        kind = Path if field.name == "data" else types[field.name]
        choices = CHOICES.get(field.name)
        parser.add_argument(flag, type=kind, default=field.default, choices=choices, help=text)
    settings = Settings(**vars(parser.parse_args(arguments)))
    if (settings.data is None) == (settings.synthetic == 0):
        parser.error("give either --data or --synthetic")
    if settings.two_phase and settings.form != "orepa":
        parser.error("--two-phase makes the kernels of blocks: it needs --form orepa")
    return settings
