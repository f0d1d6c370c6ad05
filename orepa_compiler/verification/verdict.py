"""Holds what a comparison found: a row for each output of each batch, and the verdict."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

WIDTH = 120  # of the text that str() gives
MOST_ROWS = 40  # printed; the rest is counted, and to_dict() has them all


@dataclass(frozen=True)
class Row:
    """One output of one batch.

    shape, dtype: the reference's. error, noise, tolerance: relative to the largest value of the
    truth (of an integer output: the share of entries that differ); None where it did not come to
    that. top1: the share of positions with the truth's top-1 along axis 1; None where that axis
    has fewer than two entries. reason: why the row fails; "" where it passes. made: the name of the
    inputs (random, constant, large, small) where they were made; "" where they were given.
    """

    name: str
    batch: int
    shape: tuple[int, ...]
    dtype: str
    error: float | None = None
    noise: float | None = None
    tolerance: float | None = None
    top1: float | None = None
    reason: str = ""
    made: str = ""

    @property
    def where(self) -> str:
        """batch 2, output; with the kind of inputs that were made."""
        return f"batch {self.batch}{f' ({self.made})' if self.made else ''}, {self.name}"

    @property
    def ok(self) -> bool:
        return not self.reason

    @property
    def severity(self) -> tuple[bool, float]:
        """What the worst row is the largest in."""
        if self.error is None or not self.tolerance:
            return not self.ok, float("inf") if self.error is None or self.error else 0.0
        return not self.ok, self.error / self.tolerance


@dataclass(frozen=True)
class Agreement:
    """How often one output decides as the truth does, over all inputs that were given.

    positions: where a top-1 along axis 1 was compared. share: of them, with the truth's. expected:
    the same of the noise. reason: why that is too rare; "" where it is not.
    """

    name: str
    positions: int
    share: float
    expected: float
    reason: str = ""

    def __str__(self) -> str:
        return (
            f"{self.name}: the truth's top-1 at {self.share:.1%} of {self.positions:,} positions "
            f"of the inputs (the noise alone: {self.expected:.1%})"
        )


@dataclass(frozen=True, repr=False)
class Report:
    """The verdict: truthy only when something was compared and all of it agrees.

    rows: one for each batch and output. notes: what a reader should know, whatever the verdict.
    precision: the dtype whose noise the tolerances come from. factor: tolerance / noise.
    agreements: of each output with a top-1, where the noise is that of int8.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    precision: str
    factor: float
    agreements: tuple[Agreement, ...] = ()

    def __bool__(self) -> bool:
        agree = not any(agreement.reason for agreement in self.agreements)
        return bool(self.rows) and all(row.ok for row in self.rows) and agree

    @property
    def worst(self) -> Row | None:
        """The failing row, and else the row, whose error is largest beside its tolerance."""
        return max(self.rows, key=lambda row: row.severity, default=None)

    @property
    def max_error(self) -> float:
        """The largest error of all rows; inf where one of them, or everything, was not compared."""
        errors = [float("inf") if row.error is None else row.error for row in self.rows]
        return max(errors, default=float("inf"))

    @property
    def verdict(self) -> str:
        """PASS or FAIL and why, in one line."""
        worst = self.worst
        if worst is None:
            return "FAIL: nothing was compared, the list of inputs is empty"
        if not worst.ok:
            failing = sum(not row.ok for row in self.rows)
            rows = _count(len(self.rows), "row")
            return f"FAIL: {failing} of {rows}; {worst.where}: {worst.reason}"
        rare = [agreement.reason for agreement in self.agreements if agreement.reason]
        if rare:
            return f"FAIL: {rare[0]}"
        names = _count(len({row.name for row in self.rows}), "output")
        batches = _count(len({row.batch for row in self.rows}), "batch")
        return (
            f"PASS: {names} on {batches} in {self.precision}; the worst error is "
            f"{_number(worst.error)}, its tolerance {_number(worst.tolerance)}"
        )

    def __repr__(self) -> str:
        return f"<Report {self.verdict}>"

    def __str__(self) -> str:
        # Plain text, whatever FORCE_COLOR says: a report is also written to files.
        page = io.StringIO()
        Console(file=page, width=WIDTH, force_terminal=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())

    def __rich__(self) -> Group:
        style = "bold green" if self else "bold red"
        shown = sorted(self.rows, key=lambda row: row.ok)[:MOST_ROWS]
        failing = [row for row in shown if not row.ok and row is not self.worst]
        below = [Text(f"{row.where}: {row.reason}") for row in failing]
        if len(self.rows) > len(shown):
            below.append(Text(f"and {len(self.rows) - len(shown)} more rows"))
        below += [Text(f"agreement: {agreement}") for agreement in self.agreements]
        below += [Text(f"note: {note}") for note in self.notes]
        return Group(Text(self.verdict, style=style), _table(shown), *below)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values that json.dumps takes; None for what was not measured."""
        rows = [{**asdict(row), "shape": list(row.shape), "ok": row.ok} for row in self.rows]
        return {
            "ok": bool(self),
            "verdict": self.verdict,
            "max_error": None if self.max_error == float("inf") else self.max_error,
            "precision": self.precision,
            "factor": self.factor,
            "rows": rows,
            "agreements": [asdict(agreement) for agreement in self.agreements],
            "notes": list(self.notes),
        }


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("batch", "output", "shape", "dtype", "error", "noise", "tolerance", "top-1", ""):
        is_text = name in ("output", "shape", "dtype", "")
        justify: Literal["left", "right"] = "left" if is_text else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        numbers = [_number(value) for value in (row.error, row.noise, row.tolerance)]
        top1 = "-" if row.top1 is None else f"{row.top1:.2%}"
        mark = Text("ok", style="green") if row.ok else Text("FAIL", style="red")
        texts = [Text(text) for text in (row.name, str(row.shape), row.dtype)]
        table.add_row(f"{row.batch} {row.made}".rstrip(), *texts, *numbers, top1, mark)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0"


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{plural if number != 1 else ''}"
