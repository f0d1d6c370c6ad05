"""docs/field.md: what the rows say, as one page of markdown; and the same as a table to print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from benchmarks.field.examining import TOLERANCE, Row, is_sound
from benchmarks.zoo.counting import normalised

_INTRODUCTION = """\
# The field

This page collapses published blocks (each trained as several layers and deployed as one), written
from their papers, and every model of timm that has a method `fuse`, `reparameterize` or
`switch_to_deploy`. Weights are random, and norm statistics are as if trained. `orepa.collapse`
knows none of these blocks by name: one analysis collapses them all, and each result is compared
with the model before. The [glossary](words.md) explains region, fold and the other terms.

- **convs**, **norms** and **MACs** (multiply-accumulates) are counted while the model runs on one
  image, before and after; convs and norms that are called as functions count too. **left**: norms
  after collapse that are the only reader of a conv or linear layer. The goal is 0.
- **error**: the largest difference from the original model in float64, divided by its largest
  output: for the collapsed model in float64, in float32, and for the original model in float32.
- A row is *collapsed* if the error is at most {float64:.0e} in float64 and {float32:.0e} in
  float32, no norm is left, and there are no more MACs than before. A row is *refused* if
  `collapse` must leave it alone, and does, with the right reason.
- A net that amplifies rounding may have a larger error: in float32 twice the original model's own;
  in float64 four times **one ulp**, by which we mean how far the original model's outputs move if
  each weight moves by at most one unit in the last place (the worst of three draws). Folding a
  norm rounds each weight, so it cannot do better.
"""
_TIMM = """\
Every model with such a method, at {size} pixels, compared with timm's own `reparameterize_model`. A
row fails if timm leaves fewer norms or fewer MACs, or has less than half the error in float32. A
smaller difference is rounding: compare the column *original*, the model before either.

**own**: modules that the analysis cannot collapse completely; `collapse` calls the module's own
method in float64, checks the result, and uses it.
"""


def report(rows: Iterable[Row], environment: dict[str, Any]) -> str:
    """The page for these rows."""
    every = list(rows)
    blocks = [row for row in every if row["kind"] == "block"]
    models = [row for row in every if row["kind"] == "timm" and "after" in row]
    others = [row for row in every if "after" not in row]
    tolerances = {str(dtype).removeprefix("torch."): t for dtype, t in TOLERANCE.items()}
    sizes = sorted({row["size"] for row in models})
    parts = [
        _INTRODUCTION.format(**tolerances),
        _markdown(("", ""), headline(blocks, models, others)),
        "## Blocks\n\n" + _markdown(_TITLES, [_block_line(row) for row in blocks]),
        "## Refused, and why\n\n" + _markdown(("block", "reason"), _refusals(blocks)),
        "## timm\n\n" + _TIMM.format(size=" or ".join(map(str, sizes))),
        _markdown(_FAMILY_TITLES, _families(models)),
        _markdown(_TIMM_TITLES, [_timm_line(row) for row in models]),
        "## Models without a result\n\n" + _others(others),
        "## What stays separate in timm's models, and why\n\n"
        + _markdown(("model", "norms left", "reasons"), _left(models)),
        "## How it was run\n\n" + _markdown(("", ""), list(environment.items())),
    ]
    return "\n".join(parts)


def _others(rows: Sequence[Row]) -> str:
    lines = [(row["name"], row["status"], row["why"]) for row in rows]
    return _markdown(("model", "", "why"), lines) if lines else "None.\n"


def has_failed(row: Row) -> bool:
    """Whether a row is wrong, or could not be made; one that was not tried is neither."""
    return row["status"] not in ("collapsed", "refused", "not run")


def headline(
    blocks: Sequence[Row], models: Sequence[Row], others: Sequence[Row]
) -> list[tuple[str, str]]:
    """The figures of the whole page. others: models without a row."""
    every = [*blocks, *models]
    beside = [row for row in models if "after" in row["timm"]]
    return [
        ("published blocks collapsed as they should be", _share(blocks, "collapsed")),
        ("published blocks refused as they should be", _share(blocks, "refused")),
        ("models of timm collapsed", _share(models, "collapsed")),
        ("failed", str(sum(map(has_failed, [*every, *others])))),
        ("not run", str(sum(row["status"] == "not run" for row in others))),
        ("largest error of a block in float64", f"{_largest(blocks, 'float64'):.1e}"),
        ("largest error of a model of timm in float64", f"{_largest(models, 'float64'):.1e}"),
        ("models of timm above 1e-12, but within rounding", str(sum(map(_is_rounding, models)))),
        ("largest error of a block in float32", f"{_largest(blocks, 'float32'):.1e}"),
        ("norms left directly after a conv", str(sum(row["after"]["behind"] for row in every))),
        ("rows with more MACs than before", str(sum(_grows(row) for row in every))),
        (
            "norms that `orepa.collapse` leaves in timm's models",
            str(sum(row["after"]["norms"] for row in beside)),
        ),
        (
            "norms that timm's own method leaves in them",
            str(sum(row["timm"]["after"]["norms"] for row in beside)),
        ),
    ]


def table(rows: Iterable[Row]) -> Table:
    """All rows, to be printed."""
    printed = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(_TITLES):
        printed.add_column(
            title, justify="left" if index in (0, 1, 9) else "right", overflow="fold"
        )
    for row in rows:
        style = "red" if has_failed(row) else None
        printed.add_row(*_printed_line(row), style=style)
    return printed


_TITLES = (
    "block", "from", "regions", "convs", "norms", "left", "MACs", "error, float64", "float32",
    "",
)  # fmt: skip
_FAMILY_TITLES = (
    "module of timm", "models", "collapsed", "largest error, float64", "in", "norms left", "timm",
)  # fmt: skip
_TIMM_TITLES = (
    "model", "classes", "regions", "own", "convs", "norms", "timm", "left", "timm", "MACs",
    "error, float64", "one ulp", "timm", "float32", "timm", "original", "",
)  # fmt: skip


def _printed_line(row: Row) -> tuple[str, ...]:
    if "after" in row:
        return _block_line(row)
    return (row["name"], row["why"], *("",) * (len(_TITLES) - 3), row["status"])


def _block_line(row: Row) -> tuple[str, ...]:
    return (
        row["name"],
        row["source"],
        str(row["regions"]),
        _change(row, "convs"),
        _change(row, "norms"),
        str(row["after"]["behind"]),
        f"{row['before']['macs']:,} -> {row['after']['macs']:,}",
        f"{row['float64']:.1e}",
        f"{row['float32']:.1e} ({row['noise']:.1e})",
        row["status"],
    )


def _families(models: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each module of timm that defines the classes."""
    lines = []
    for family in sorted({family for row in models for family in _modules(row)}):
        own = [row for row in models if family in _modules(row)]
        worst = max(own, key=lambda row: row["float64"])
        beside = [row["timm"]["after"]["norms"] for row in own if "after" in row["timm"]]
        left = sum(row["after"]["norms"] for row in own)
        lines.append(
            (
                family,
                str(len(own)),
                str(sum(row["status"] == "collapsed" for row in own)),
                f"{worst['float64']:.1e}",
                worst["name"],
                str(left),
                str(sum(beside)) if len(beside) == len(own) else "raises",
            )
        )
    return lines


def _modules(row: Row) -> set[str]:
    return {name.partition(".")[0] for name in row["source"].split(", ")}


def _timm_line(row: Row) -> tuple[str, ...]:
    timm = row["timm"]
    after = timm.get("after", {})
    return (
        row["name"],
        row["source"].replace(", ", "<br>"),
        str(row["regions"]),
        str(row["adopted"]),
        _change(row, "convs"),
        _change(row, "norms"),
        str(after.get("norms", "-")),
        str(row["after"]["behind"]),
        str(after.get("behind", "-")),
        f"{row['before']['macs'] / 1e6:.1f} M -> {row['after']['macs'] / 1e6:.1f} M",
        f"{row['float64']:.1e}",
        f"{row['rounding']:.1e}" if row.get("rounding") else "",
        _error(timm, "float64"),
        f"{row['float32']:.1e}",
        _error(timm, "float32"),
        f"{row['noise']:.1e}",
        row["status"],
    )


def _error(timm: Row, precision: str) -> str:
    return f"{timm[precision]:.1e}" if precision in timm else "raises"


def _refusals(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(row["name"], "<br>".join(row["reasons"])) for row in rows if row["reasons"]]


def _left(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    return [
        (row["name"], str(row["after"]["norms"]), "<br>".join(sorted(reasons)))
        for row in rows
        if (reasons := {normalised(reason) for reason in row["reasons"]})
    ]


def _change(row: Row, what: str) -> str:
    return f"{row['before'][what]} -> {row['after'][what]}"


def _is_rounding(row: Row) -> bool:
    return row.get("rounding") is not None and is_sound(row)


def _grows(row: Row) -> bool:
    return bool(row["after"]["macs"] > row["before"]["macs"])


def _largest(rows: Sequence[Row], precision: str) -> float:
    return max((row[precision] for row in rows), default=0.0)


def _share(rows: Sequence[Row], status: str) -> str:
    return f"{sum(row['status'] == status for row in rows)} of {len(rows)}"


def _markdown(titles: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [[_cell(str(value)) for value in line] for line in lines]
    ruled = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
