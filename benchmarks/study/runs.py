"""One training, what it came to, and the file of lines that remembers it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Held = Literal["validation", "test"]
Optimizer = Literal["SGD", "AdamW"]
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training. Runs that differ in arm and rate alone see the same images in the same order.

    held: what it is measured on; "validation" for the choice of a rate. train: images. warmup: in
    epochs. scaling_decays: whether weight decay acts on the scaling layers too. width: channels of
    the first stage's k x k convs.
    """

    data: str
    net: str
    arm: str
    rate: float
    seed: int
    held: Held = "test"
    epochs: int = 20
    train: int = 500
    batch: int = 50
    weight_decay: float = 1e-4
    warmup: int = 0
    scaling_decays: bool = False
    width: int = 16
    optimizer: Optimizer = "SGD"


class Records:
    """What is known of each run: a line of JSON each, appended as a run ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[Run, Record] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self.known[Run(**record["run"])] = record

    def add(self, run: Run, found: Mapping[str, Any]) -> None:
        record = {"run": asdict(run), **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.known[run] = record

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those that were not made, each once, in their order."""
        return [run for run in dict.fromkeys(runs) if run not in self.known]

    def accuracy(self, run: Run) -> float:
        """In per cent."""
        return float(self.known[run]["accuracy"])
