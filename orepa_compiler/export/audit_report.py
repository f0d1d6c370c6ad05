"""What an audit of half precision found, printed and as plain data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

WIDTH = 120  # of the text that str() gives
MOST_ROWS = 30  # printed; to_dict() has them all
NEAREST = 3  # of the rows without a problem: the largest values


@dataclass(frozen=True)
class AuditRow:
    """One weight, or all results of one operator in one module's forward.

    what: the weight's name or the operator's. largest: the largest magnitude. subnormal: the share
    of values other than 0 below the smallest normal number. loss: the error of the cast relative to
    the values, both as root mean square. problem: overflow, subnormal, or "".
    """

    module: str
    what: str
    largest: float
    subnormal: float
    loss: float
    problem: str


@dataclass(frozen=True, repr=False)
class HalfAudit:
    """The verdict: truthy when nothing overflows or goes subnormal.

    keep: the modules to keep in float32 against what was found; an empty path where no module but
    the whole model would do. kept: those that were kept.
    """

    precision: str
    rows: tuple[AuditRow, ...]
    keep: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows) and not self.problems

    @property
    def problems(self) -> list[AuditRow]:
        return [row for row in self.rows if row.problem]

    @property
    def advice(self) -> str:
        """What to do, in one line."""
        if not self.problems:
            return "nothing overflows or goes subnormal"
        if "" in self.keep:
            other = "bf16 or fp32" if self.precision == "fp16" else "fp32"
            return f"no module's own output fits {self.precision}: export in {other}"
        return "keep in float32: " + " ".join(f"--keep-fp32 {path}" for path in self.keep)

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if not self.problems:
            largest = max((row.largest for row in self.rows), default=0.0)
            return f"{self.precision}: {self.advice} (largest magnitude {largest:.4g})"
        kinds = [row.problem for row in self.problems]
        counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        return f"{self.precision}: {', '.join(counts)}; {self.advice}"

    def __repr__(self) -> str:
        return f"<HalfAudit {self.verdict}>"

    def __str__(self) -> str:
        page = io.StringIO()
        Console(file=page, width=WIDTH, force_terminal=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())

    def __rich__(self) -> Group:
        ranked = sorted(self.problems, key=lambda row: row.largest, reverse=True)
        fine = sorted((r for r in self.rows if not r.problem), key=lambda r: r.largest)
        shown = [*ranked[:MOST_ROWS], *fine[::-1][:NEAREST]]
        rest = len(self.rows) - len(shown)
        hidden = max(0, len(ranked) - MOST_ROWS)
        below = [Text(f"and {rest} more, {hidden} of them with a problem")] if rest else []
        return Group(Text(self.verdict), _table(shown), *below)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values that json.dumps takes."""
        return {
            "ok": bool(self),
            "verdict": self.verdict,
            "precision": self.precision,
            "keep": list(self.keep),
            "kept": list(self.kept),
            "rows": [asdict(row) for row in self.rows],
        }


def _table(rows: Sequence[AuditRow]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("module", "what"):
        table.add_column(name, overflow="fold")
    for name in ("largest", "subnormal", "loss"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        mark = Text(row.problem, style="red") if row.problem else Text("ok", style="green")
        where = Text(row.module or "(the model itself)")
        numbers = (f"{row.largest:.4g}", f"{row.subnormal:.2%}", f"{row.loss:.1e}")
        table.add_row(where, Text(row.what), *numbers, mark)
    return table
