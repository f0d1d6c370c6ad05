"""docs/zoo.md: what the rows say, as one page of markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.zoo.building import subjects
from benchmarks.zoo.checks import TOLERANCE
from benchmarks.zoo.examining import Row

_WHY_SHOWN = 3  # reasons in a family's row; the table of reasons has all
_TEXT = 220  # characters of an error in the table of failures

_INTRODUCTION = """\
# The zoo

This page tests the package on every model of timm and torchvision that has a conv. Each model gets
random weights, random norm statistics and the smallest useful input. The [glossary](words.md)
explains plan, stock model, fold and the other terms. The checks, in order:

1. `plan`: every conv is either expanded or listed with a reason.
2. `expand(init="preserve")` leaves the model's outputs as they were.
3. One step of SGD in train mode changes the outputs, and everything stays finite.
4. `collapse` leaves the outputs of the expanded model as they were, in eval mode.
5. `collapse(fold_norm=False)` loads with `strict=True` into a fresh stock model, which then gives
   the same outputs. If `expand` inserted a norm after a conv without a bias, the stock model has no
   place for it: the package refuses, and the page lists the model.

An error is the largest difference divided by the largest output, for the worst output tensor. A
model passes in float32 if every error is at most {float32:.0e}. If float32 itself is noisier than
that, all checks run again in float64, with a limit of {float64:.0e}. Detectors return boxes after
thresholds, so their feature maps and head outputs are compared, for given boxes.
"""


_FIGURES = """\
![Relative errors of all models, and their limits](zoo/errors.svg)

For each check, the number of models with an error of that size. To the right of the dashed line a
model fails.

![Spatial convs expanded by default, by family](zoo/families.svg)

The share of each family's spatial convs (their number in brackets) that `expand` turns into blocks
by default. The table below has the reasons for the others; `where=` expands them too.
"""


def report(rows: Iterable[Row], environment: dict[str, Any]) -> str:
    """The page for these rows. Models without a conv are counted, not listed."""
    every = sorted(rows, key=lambda row: (row["library"], row["family"], row["name"]))
    bearing = [row for row in every if row["status"] != "no conv"]
    tolerances = {str(dtype).removeprefix("torch."): t for dtype, t in TOLERANCE.items()}
    parts = [
        _INTRODUCTION.format(**tolerances),
        _headline(bearing, without=len(every) - len(bearing)),
        _FIGURES,
        "## Why convs are left alone\n\n" + _reasons(bearing),
        "## Batch norms not folded into the conv before them\n\n" + _norms_left(bearing),
        "## Families\n\n" + _families(bearing),
        "## Failed or not compared\n\n" + _failures(bearing),
        "## Not loaded into the stock model\n\n" + _refusals(bearing),
        "## Checked at reduced depth\n\n" + _reduced(bearing),
        "## How it was run\n\n" + _environment(bearing, environment),
    ]
    return "\n".join(parts)


def _headline(rows: Sequence[Row], *, without: int) -> str:
    status = Counter(row["status"] for row in rows)
    stock = Counter(row["checks"]["stock"]["outcome"] for row in rows if "checks" in row)
    planned = [row for row in rows if "plan" in row]
    convs, spatial = (sum(row[key] for row in planned) for key in ("convs", "spatial"))
    found = sum(row.get("norms_behind_conv", 0) for row in rows)
    left = sum(len(row.get("norms_behind_conv_after", ())) for row in rows)
    norms, norms_left = (sum(row.get(key, 0) for row in rows) for key in ("norms", "norms_after"))
    failed = len(rows) - status["pass"] - status["not compared"]
    silent = sum(len(row["plan"]["silent"]) for row in planned)
    reduced = sum("reduced_for" in row for row in rows if row["status"] == "pass")
    lines = [
        ("models examined, in random order", _share(len(rows) + without, len(subjects("*")))),
        ("models with a conv", f"{len(rows):,} ({without} more have none)"),
        ("pass", _share(status["pass"], len(rows))),
        ("of these, checked at reduced depth to save time or memory", f"{reduced:,}"),
        ("fail", f"{failed:,}"),
        ("not compared", f"{status['not compared']:,}"),
        ("pass in float32", f"{_passed(rows, 'float32'):,}"),
        ("pass in float64, because float32 is noisier", f"{_passed(rows, 'float64'):,}"),
        ("strict load into the stock model", f"{stock['pass']:,} ({stock['refused']:,} refused)"),
        ("convs", f"{convs:,}, of which {silent} neither expanded nor explained"),
        ("convs expanded by default", _share(_sum(planned, "plan", "expanded"), convs)),
        ('convs expanded with `where="**"`', _share(_sum(planned, "plan_all", "expanded"), convs)),
        ("spatial convs (k > 1, neither patch embeddings nor transposed)", f"{spatial:,}"),
        (
            "spatial convs expanded by default",
            _share(_sum(planned, "plan", "spatial_expanded"), spatial),
        ),
        (
            'spatial convs expanded with `where="**"`',
            _share(_sum(planned, "plan_all", "spatial_expanded"), spatial),
        ),
        ("batch norms", f"{norms:,}"),
        ("of these, not folded by `collapse`", _share(norms_left, norms)),
        ("batch norms directly after a conv or linear layer", f"{found:,}"),
        ("of these, not folded by `collapse`", f"{left:,}"),
    ]
    return _table(("", ""), lines)


def _reasons(rows: Sequence[Row]) -> str:
    """Each reason with how many convs it keeps: by default, and when everything is asked for."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        for plan, kind in (("plan", "reasons"), ("plan", "spatial_reasons"),
                           ("plan_all", "reasons"), ("plan_all", "spatial_reasons")):  # fmt: skip
            for reason, count in row.get(plan, {}).get(kind, {}).items():
                counts.setdefault(reason, Counter())[f"{plan}.{kind}"] += count
    keys = ("plan.reasons", "plan.spatial_reasons", "plan_all.reasons", "plan_all.spatial_reasons")
    ordered = sorted(counts.items(), key=lambda item: -item[1][keys[0]])
    lines = [(_cell(reason), *(f"{found[key]:,}" for key in keys)) for reason, found in ordered]
    titles = ("reason", "convs", "of these spatial", 'convs, `where="**"`', 'spatial, `where="**"`')
    return _table(titles, lines, right=(1, 2, 3, 4))


def _norms_left(rows: Sequence[Row]) -> str:
    """Why collapse left norms that read what a conv or linear layer gives, and in which models."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for reason in row.get("norms_behind_conv_after", {}).values():
            found.setdefault(reason, Counter())[row["name"]] += 1
    lines = [
        (_cell(reason), str(names.total()), ", ".join(f"{n} ({c})" for n, c in names.items()))
        for reason, names in sorted(found.items(), key=lambda item: -item[1].total())
    ]
    return _table(("reason", "norms", "models"), lines, right=(1,)) if lines else "None.\n"


def _families(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["library"], row["family"]), []).append(row)
    lines = [_family(library, family, group) for (library, family), group in groups.items()]
    titles = (
        "library", "family", "models", "pass", "convs", "expanded", "spatial", "expanded",
        "left alone, main reasons", "error, float32", "float64", "seconds per model",
    )  # fmt: skip
    return _table(titles, lines, right=(2, 3, 4, 5, 6, 7, 9, 10, 11))


def _family(library: str, family: str, rows: list[Row]) -> tuple[str, ...]:
    planned = [row for row in rows if "plan" in row]
    convs, spatial = (sum(row[key] for row in planned) for key in ("convs", "spatial"))
    reasons: Counter[str] = Counter()
    for row in planned:
        reasons.update(row["plan"]["reasons"])
    shown = [f"{count:,} {_cell(reason)}" for reason, count in reasons.most_common(_WHY_SHOWN)]
    rest = sum(reasons.values()) - sum(count for _, count in reasons.most_common(_WHY_SHOWN))
    return (
        library,
        family,
        str(len(rows)),
        str(sum(row["status"] == "pass" for row in rows)),
        f"{convs:,}",
        f"{_sum(planned, 'plan', 'expanded'):,}",
        f"{spatial:,}",
        f"{_sum(planned, 'plan', 'spatial_expanded'):,}",
        "<br>".join([*shown, *([f"{rest:,} for other reasons"] if rest else [])]),
        _largest(rows, "float32"),
        _largest(rows, "float64"),
        f"{sum(row.get('total_s', 0.0) for row in rows) / len(rows):.1f}",
    )


def _largest(rows: Sequence[Row], precision: str) -> str:
    errors = [
        check["error"]
        for row in rows
        if row.get("precision") == precision
        for check in row["checks"].values()
        if check["error"] is not None
    ]
    return f"{max(errors):.1e}" if errors else "-"


def _failures(rows: Sequence[Row]) -> str:
    bad = [row for row in rows if row["status"] != "pass"]
    lines = [(_name(row), row["status"], _cell(why_of(row))) for row in bad]
    return _table(("model", "status", "why"), lines) if lines else "None.\n"


def why_of(row: Row) -> str:
    """What went wrong, in one line: the last of an error's text, or the checks that failed."""
    if "why" in row:
        return _last_line(row["why"])
    found = []
    for name, check in row.get("checks", {}).items():
        if check["outcome"] not in ("pass", "refused"):
            error = "" if check["error"] is None else f" {check['error']:.1e}"
            text = _last_line(check["message"])
            found.append(f"{name}: {check['outcome']}{error}{' ' if text else ''}{text}")
    for plan in ("plan", "plan_all"):
        if silent := row.get(plan, {}).get("silent"):
            found.append(f"{plan}: {len(silent)} convs neither expanded nor refused")
    if "plan_error" in row:
        found.append(f"plan: {_last_line(row['plan_error'])}")
    return "; ".join(found)


def _last_line(text: str) -> str:
    lines = text.strip().split("\n")
    return lines[-1].strip()[:_TEXT]


def _refusals(rows: Sequence[Row]) -> str:
    found: dict[str, list[str]] = {}
    for row in rows:
        stock = row.get("checks", {}).get("stock", {})
        if stock.get("outcome") == "refused":
            found.setdefault(stock["message"], []).append(row["name"])
    lines = [
        (_cell(text), str(len(names)), ", ".join(names[:8]) + (" ..." if len(names) > 8 else ""))
        for text, names in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    return _table(("the reason given", "models", "which"), lines) if lines else "None.\n"


def _reduced(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if "reduced_for" in row:
            how = f"{row['reduced_by']} blocks left out" if "sibling" not in row else row["sibling"]
            seconds = f"{row['meta_plan_s']:.1f}" if "meta_plan_s" in row else "-"
            size = f"{row['parameters'] / 1e6:,.0f} M"
            lines.append((_name(row), size, row["reduced_for"], how, seconds))
        elif "float64_reduced" in row:
            how = f"{row['float64_reduced']} blocks left out, in float64 only"
            lines.append((_name(row), f"{row['parameters'] / 1e6:,.0f} M", "memory", how, "-"))
    if not lines:
        return "None.\n"
    text = (
        "The plan, and every count on this page, is of the full model, on the `meta` device. The "
        "checks ran on a model that keeps two of each run of equal blocks (the net's own, such as "
        "residual blocks), or on the smaller model of the same class that the table names. To save "
        "memory: with all gradients, the full model needs about as much as one of two models that "
        "run at the same time may use, or more.\n\n"
    )
    titles = ("model", "parameters", "to save", "what was checked", "seconds to plan the full one")
    return text + _table(titles, lines, right=(1, 4))


def _environment(rows: Sequence[Row], environment: dict[str, Any]) -> str:
    hours = sum(row.get("total_s", 0.0) for row in rows) / 3600
    facts = dict(environment) | {
        "time": f"{hours:.1f} hours of one core",
        "rows": _versions(rows, environment.get("source")),
    }
    return _table(("", ""), [(name, _cell(str(value))) for name, value in facts.items()])


def _versions(rows: Sequence[Row], source: str | None) -> str:
    """How many rows are of this version of the library's source."""
    counts = Counter(row.get("source") for row in rows)
    others = len(counts.keys() - {source})
    if not others:
        return "all from this version of the source"
    return (
        f"{counts[source]:,} of {len(rows):,} from this version of the source, the others from "
        f"{others} earlier ones"
    )


def _passed(rows: Sequence[Row], precision: str) -> int:
    return sum(row["status"] == "pass" and row.get("precision") == precision for row in rows)


def _sum(rows: Sequence[Row], plan: str, key: str) -> int:
    return sum(row[plan][key] for row in rows)


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.1f} %)" if whole else "0 of 0"


def _name(row: Row) -> str:
    return f"{row['library']} {row['name']}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    rule = ["---:" if index in right else "---" for index in range(len(titles))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (titles, rule, *lines))
