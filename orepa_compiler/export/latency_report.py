"""Latencies of a collapsed model beside the stock one, printed and as plain data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

WIDTH = 120  # of the text that str() gives


@dataclass(frozen=True)
class Contents:
    """What an ONNX file holds. size: in bytes, with its weights."""

    path: str
    nodes: int
    convs: int
    norms: int
    size: int


@dataclass(frozen=True)
class Timing:
    """Of all calls: the median and the 95th percentile in ms; samples per second at the median."""

    median_ms: float
    p95_ms: float
    throughput: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float], batch: int) -> Timing:
        """The timing of calls on `batch` samples each."""
        median, p95 = np.percentile(seconds, [50, 95])
        return cls(1e3 * float(median), 1e3 * float(p95), batch / float(median), len(seconds))

    def __str__(self) -> str:
        return (
            f"median {self.median_ms:.3f} ms, 95th percentile {self.p95_ms:.3f} ms "
            f"({self.calls} calls, {self.throughput:,.1f} samples/s)"
        )


@dataclass(frozen=True)
class BenchRow:
    """One backend: model beside against, or the reason why it was not run.

    ratio: model's time over against's, the median over the rounds; low, high: its interval.
    """

    backend: str
    model: Timing | None = None
    against: Timing | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """What the ratio says, in words."""
        if self.ratio is None or self.low is None or self.high is None:
            return f"not run: {self.reason}"
        if self.low <= 1 <= self.high:
            return "within noise"
        return "faster" if self.high < 1 else "slower"


@dataclass(frozen=True, repr=False)
class Bench:
    """Truthy when at least one backend ran. files: model, then against."""

    files: tuple[Contents, ...]
    rows: tuple[BenchRow, ...]
    batch: int
    rounds: int

    def __bool__(self) -> bool:
        return any(row.ratio is not None for row in self.rows)

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps model from being as fast as against: other node counts, a slower backend.

        Two files of the same architecture have the same number of nodes.
        """
        found = [f"{row.backend}: slower" for row in self.rows if row.verdict == "slower"]
        counts = [file.nodes for file in self.files]
        if len(set(counts)) > 1:
            texts = " and ".join(f"{count:,}" for count in counts)
            found.insert(0, f"the files have {texts} nodes: not the same architecture")
        return tuple(found)

    def __repr__(self) -> str:
        return f"<Bench {'; '.join(f'{row.backend}: {row.verdict}' for row in self.rows)}>"

    def __str__(self) -> str:
        page = io.StringIO()
        Console(file=page, width=WIDTH, force_terminal=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())

    def __rich__(self) -> Group:
        contents = _table("file", "nodes", "convs", "norms", "bytes")
        for file in self.files:
            counts = (file.nodes, file.convs, file.norms, file.size)
            contents.add_row(Text(file.path), *(f"{count:,}" for count in counts))
        timings = _table("backend", "file", "median ms", "p95 ms", "samples/s", "ratio", "")
        for row in self.rows:
            if row.model is None or row.against is None:
                timings.add_row(row.backend, "", "", "", "", "", Text(row.verdict))
                continue
            ratio = f"{row.ratio:.3f} ({row.low:.3f} to {row.high:.3f})"
            timings.add_row(row.backend, "model", *_numbers(row.model), ratio, row.verdict)
            timings.add_row("", "against", *_numbers(row.against), "", "")
        note = (
            f"batch {self.batch}; {self.rounds} rounds, each file in turn; ratio: model's time over"
            " against's, the median over the rounds and its 95 % interval; within noise: 1 is in it"
        )
        problems = [Text(problem) for problem in self.problems]
        return Group(contents, Text(""), timings, Text(note), *problems)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values that json.dumps takes."""
        return {
            "files": [asdict(file) for file in self.files],
            "rows": [{**asdict(row), "verdict": row.verdict} for row in self.rows],
            "batch": self.batch,
            "rounds": self.rounds,
            "problems": list(self.problems),
        }


def _numbers(timing: Timing) -> tuple[str, str, str]:
    return f"{timing.median_ms:.3f}", f"{timing.p95_ms:.3f}", f"{timing.throughput:,.1f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        justify: Literal["left", "right"] = "left" if name in ("file", "backend", "") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    return table
