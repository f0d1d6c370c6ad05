"""The page of evidence: a table and a figure for each question, from the records alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import mean, stdev

from benchmarks.study.arms import ARMS
from benchmarks.study.proposition import BRANCHES, STEPS, largest_departure
from benchmarks.study.questions import Cell, Question, progress
from benchmarks.study.runs import Records
from benchmarks.study.statistics import Difference, paired

ALL_NETS = "all nets"
COLUMNS = (
    "net",
    "setting",
    "arm",
    "rate",
    "accuracy",
    "difference",
    "95 % interval",
    "says",
    "similarity",
)


@dataclass(frozen=True)
class Line:
    """What is known of a cell at a rate, or over all nets.

    rate: None over all nets, for each has its own. difference: None for the base itself.
    diverged: runs whose loss was not finite at the end.
    """

    cell: Cell
    rate: float | None
    accuracies: tuple[float, ...]
    similarity: float | None
    diverged: int
    difference: Difference | None

    @property
    def mean(self) -> float:
        return mean(self.accuracies)


def lines(question: Question, records: Records) -> list[Line]:
    """The cells whose runs are all there; a base that is missing leaves its difference out."""
    found = list(_lines(question, records))
    return [*found, *_over_nets(question, found)]


def _lines(question: Question, records: Records) -> Iterator[Line]:
    for cell in question.cells():
        for rate in cell.rates(records):
            runs = cell.measured(rate)
            if records.missing(runs):
                continue
            found = [records.known[run] for run in runs]
            similar = [r["similarity"] for r in found if r["similarity"] is not None]
            yield Line(
                cell,
                rate,
                tuple(records.accuracy(run) for run in runs),
                mean(similar) if similar else None,
                sum(r["loss"] is None for r in found),
                _difference(cell, rate, records),
            )


def _difference(cell: Cell, rate: float, records: Records) -> Difference | None:
    """To the base: at its own rate where rates are chosen, at the same one where they are not."""
    base = cell.base()
    if base == cell:
        return None
    rates = base.rates(records) if cell.question.is_tuned else (rate,)
    if not rates or records.missing(runs := base.measured(rates[0])):
        return None
    own = [records.accuracy(run) for run in cell.measured(rate)]
    return paired(own, [records.accuracy(run) for run in runs])


def _over_nets(question: Question, found: list[Line]) -> Iterator[Line]:
    """Each arm's mean over the nets, seed by seed: all nets share the seeds, which stay the pairs.

    Only where there are several, and an arm was measured on each.
    """
    if len(question.nets) < 2 or not question.is_tuned:
        return
    cells = list(replace(question, nets=question.nets[:1]).cells())
    own = {_name(c): [line for line in found if _name(line.cell) == _name(c)] for c in cells}
    means = {
        name: tuple(map(mean, zip(*(line.accuracies for line in every), strict=True)))
        for name, every in own.items()
        if len(every) == len(question.nets)
    }
    for cell in cells:
        if (name := _name(cell)) not in means:
            continue
        base = cell.base()
        known = None if base == cell else means.get(_name(base))
        similar = [line.similarity for line in own[name] if line.similarity is not None]
        yield Line(
            replace(cell, net=ALL_NETS),
            None,
            means[name],
            mean(similar) if similar else None,
            sum(line.diverged for line in own[name]),
            paired(means[name], known) if known else None,
        )


def _name(cell: Cell) -> tuple[str, str]:
    return cell.arm, cell.setting


def rows(found: list[Line]) -> list[tuple[str, ...]]:
    """As text, in the order of COLUMNS."""
    return [
        (
            line.cell.net,
            line.cell.setting or "-",
            line.cell.arm,
            "-" if line.rate is None else f"{line.rate:g}",
            f"{line.mean:.2f} ± {stdev(line.accuracies):.2f}",
            _difference_of(line),
            _interval(line.difference),
            _says(line),
            "-" if line.similarity is None else f"{line.similarity:.3f}",
        )
        for line in found
    ]


def table(found: list[Line]) -> list[tuple[str, ...]]:
    """The heads and the rows, without the columns in which nothing stands."""
    every = rows(found)
    kept = [i for i in range(len(COLUMNS)) if any(row[i] != "-" for row in every)]
    return [tuple(row[i] for i in kept) for row in (COLUMNS, *every)]


def _difference_of(line: Line) -> str:
    if line.difference:
        return f"{line.difference.mean:+.2f}"
    return "base" if line.cell.base() == line.cell else "-"  # - : the base was not made yet


def _interval(difference: Difference | None) -> str:
    return f"{difference.low:+.2f} to {difference.high:+.2f}" if difference else "-"


def _says(line: Line) -> str:
    if line.diverged:
        return f"{line.diverged} of {len(line.accuracies)} diverged"
    return line.difference.verdict if line.difference else "-"


def section(name: str, question: Question, records: Records) -> str:
    """A question's part of the page; it says how many of its runs are still missing."""
    found = lines(question, records)
    made, total = progress(question, records)
    text = [f"## {question.title}", "", question.asks, ""]
    if made < total:
        text += [f"{made} of {total} runs are made; what is not made is not shown.", ""]
    if found:
        text += [
            _markdown(table(found)),
            "",
            f"![{question.title}](evidence/{name}.svg)",
        ]
        text += [""]
    return "\n".join([*text, f"    python -m benchmarks.study --question {name}", ""])


def _markdown(cells: list[tuple[str, ...]]) -> str:
    head, *body = cells
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ("---",) * len(head), *body])


def proposition() -> str:
    """Proposition 1 in numbers, made anew each time: it takes a second."""
    without, with_scales = (largest_departure(scales=scales) for scales in (False, True))
    return "\n".join(
        (
            "## Without scaling layers, branches are a learning rate",
            "",
            f"Proposition 1: over {STEPS} steps of SGD in float64, {BRANCHES} branches without",
            f"scaling layers stay within {without:.0e} of one conv that learns {BRANCHES} times as",
            f"fast. With a scaling layer behind each they part from it by {with_scales:.0e}.",
            "",
        )
    )


def legend() -> str:
    """What each arm is."""
    return _markdown([("arm", "what it is"), *((name, arm.means) for name, arm in ARMS.items())])
