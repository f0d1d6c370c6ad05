"""The section of docs/zoo.md on libraries beyond timm and torchvision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.zoo.examining import Row
from benchmarks.zoo.results import Results

RESULTS = Path("benchmarks/results/libraries.json")
_HEADING = "## Beyond timm and torchvision"
_WHY_SHOWN = 12


def section(rows: Iterable[Row], environment: dict[str, Any]) -> str:
    """The table by library, why convs are left alone, and what failed."""
    every = sorted(rows, key=lambda row: (row["library"], row["name"]))
    libraries = sorted({row["library"] for row in every})
    header = (
        "| library | models | pass | refused | spatial convs | expanded | norms directly "
        "after convs | not folded | exports, of those that torch exports |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    lines = [_line(name, [r for r in every if r["library"] == name]) for name in libraries]
    return "\n\n".join(
        (
            _HEADING,
            f"Small models of other libraries, with random weights: "
            f"`{environment.get('command', '')}`, {environment.get('date', '')}. "
            f"An export was tried for {sum('exports' in row for row in every)} of them.",
            "\n".join((header, *lines, _line("all", every))),
            _reasons(every),
            _not_passed(every),
        )
    )


def with_section(page: str, results: Path = RESULTS) -> str:
    """A page with this section, from the rows on disk, in the place of an earlier one."""
    page = page.split(_HEADING)[0].rstrip() + "\n"
    if not results.exists():
        return page
    known = Results(results)
    return f"{page}\n{section(known.rows.values(), known.environment)}\n"


def _line(name: str, rows: list[Row]) -> str:
    status = Counter(row["status"] for row in rows)
    known = [row for row in rows if "plan" in row]
    spatial = sum(row["spatial"] for row in known)
    expanded = sum(row["plan"]["spatial_expanded"] for row in known)
    behind = sum(row["norms_behind_conv"] for row in known)
    left = sum(len(row["norms_left"]) for row in known if "norms_left" in row)
    asked = [row for row in known if row.get("torch_exports")]
    exported = sum(not row["exports"] for row in asked)
    share = f" ({100 * expanded / spatial:.0f} %)" if spatial else ""
    return (
        f"| {name} | {len(rows)} | {status['pass']} | {status['refused']} | {spatial:,} | "
        f"{expanded:,}{share} | {behind:,} | {left:,} | {exported} of {len(asked)} |"
    )


def _reasons(rows: list[Row]) -> str:
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.get("plan", {}).get("spatial_reasons", {}))
    lines = [f"| {why} | {count:,} |" for why, count in counts.most_common(_WHY_SHOWN)]
    return "\n".join(("| why a spatial conv is left alone | convs |\n|---|--:|", *lines))


def _not_passed(rows: list[Row]) -> str:
    lines = [f"- {r['library']}, {r['name']}: {r['status']}, {_why(r)}" for r in rows
             if r["status"] not in ("pass", "no conv")]  # fmt: skip
    return "\n".join(("Did not pass:\n", *lines)) if lines else "Every model passed."


def _why(row: Row) -> str:
    told = row.get("why") or row.get("exports") or f"errors {row.get('errors')}"
    return " ".join(str(told).split())[-220:]  # the end of a traceback says what happened
