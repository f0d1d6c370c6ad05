"""The figures of docs/zoo.md: how large the errors are, and how much of each family is expanded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from benchmarks.drawing import save
from benchmarks.zoo.checks import TOLERANCE
from benchmarks.zoo.examining import Row

CHECKED = {  # the check, and what is compared there
    "preserve": "expanded / the model",
    "collapse": "collapsed / trained",
    "stock": "stock model / trained",
}
_COLOURS = ("#1a5fb4", "#2a7f3f", "#c64600")
_LEFT = "#c0c4c9"
_EXACT = 1e-9  # in float32: no difference at all is drawn here
_COLUMNS = 2


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes errors.svg and families.svg into the folder, each whole or not at all."""
    made = []
    for name, drawn in (("errors", _errors), ("families", _families)):
        made.append(folder / f"{name}.svg")
        save(partial(drawn, rows=rows), made[-1])
    return made


def _errors(pyplot: Any, rows: Sequence[Row]) -> Any:
    """A panel for each precision: how many models have an error of that size, for each check."""
    shape = {"figsize": (8.4, 2.8), "layout": "constrained"}
    figure, axes = pyplot.subplots(1, len(TOLERANCE), **shape)
    for axis, (dtype, tolerance) in zip(axes, TOLERANCE.items(), strict=True):
        precision = str(dtype).removeprefix("torch.")
        found = errors_of(rows, precision)
        least = min((e for errors in found.values() for e in errors if e), default=tolerance)
        edges = _decades(min(least, _EXACT if precision == "float32" else least), 10 * tolerance)
        for (check, label), colour in zip(CHECKED.items(), _COLOURS, strict=True):
            drawn = [max(error, edges[0]) for error in found[check]]
            axis.hist(drawn, edges, histtype="step", color=colour, label=label, linewidth=1.4)
        axis.axvline(tolerance, color="#b3261e", linewidth=1.2, linestyle="--")
        axis.text(tolerance, 0.5, " must pass", color="#b3261e", rotation=90, va="center",
                  ha="left", transform=axis.get_xaxis_transform(), fontsize=8)  # fmt: skip
        axis.set_xscale("log")
        axis.set_title(f"{precision}: {len(found[next(iter(CHECKED))]):,} models")
        axis.set_xlabel("largest difference / largest output")
    axes[0].set_ylabel("models")
    axes[0].legend(loc="upper left", frameon=False, fontsize=8)
    return figure


def errors_of(rows: Sequence[Row], precision: str) -> dict[str, list[float]]:
    """Check -> its error in each model that was judged in this precision."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.get("precision") == precision:
            for check in CHECKED:
                error = row["checks"][check]["error"]
                if error is not None:
                    found[check].append(error)
    return found


def _decades(low: float, high: float) -> list[float]:
    """Edges of bins, four to a factor of ten."""
    first, last = floor(4 * log10(low)), ceil(4 * log10(high))
    return [10 ** (step / 4) for step in range(first, last + 1)]


def _families(pyplot: Any, rows: Sequence[Row]) -> Any:
    """A bar for each family in which some spatial convs are left alone, in columns."""
    shares = spatial_shares(rows)
    some = [share for share in shares if share[1] < share[2]]
    height = max(1, -(-len(some) // _COLUMNS))
    shape = {"figsize": (2.9 * _COLUMNS, 0.9 + 0.17 * height), "squeeze": False}
    figure, axes = pyplot.subplots(1, _COLUMNS, layout="constrained", **shape)
    for number, axis in enumerate(axes[0]):
        part = some[number * height : (number + 1) * height]
        names = [f"{name} ({total:,})" for name, _, total in part]
        axis.barh(names, [100] * len(part), color=_LEFT, height=0.72)
        done = [100 * expanded / total for _, expanded, total in part]
        axis.barh(names, done, color=_COLOURS[0], height=0.72)
        axis.set_ylim(height - 0.4, -0.6)
        axis.set_xlim(0, 100)
        axis.tick_params(axis="y", labelsize=8, length=0)
        axis.set_xlabel("% expanded")
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    whole = len(shares) - len(some)
    figure.suptitle(
        f"{whole} of {len(shares)} families: every spatial conv. The others:", fontsize=9
    )
    return figure


def spatial_shares(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    """(family, spatial convs expanded by default, all of them), the largest share first."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        if "plan" in row and row["spatial"]:
            own = "" if row["library"] == "timm" else f"{row['library']} "
            counts[own + row["family"]][0] += row["plan"]["spatial_expanded"]
            counts[own + row["family"]][1] += row["spatial"]
    found = [(name, done, total) for name, (done, total) in counts.items()]
    return sorted(found, key=lambda item: (-item[1] / item[2], item[0]))
