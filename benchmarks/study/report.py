"""The page of evidence: a table and a figure for each question, from the records alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import mean, stdev

from benchmarks.study.arms import ARMS
from benchmarks.study.cells import SEEDS, Cell, Question, progress
from benchmarks.study.proposition import BRANCHES, STEPS, largest_departure
from benchmarks.study.runs import Record, Records
from benchmarks.study.statistics import Difference, paired

ALL_NETS = "all nets"
COLUMNS = (
    "net",
    "setting",
    "arm",
    "rate",
    "loss",
    "accuracy",
    "difference",
    "95 % interval",
    "pairs",
    "says",
    "similarity",
)
_PAIRS = COLUMNS.index("pairs")
FEWEST = 2  # runs of which a spread is known


@dataclass(frozen=True)
class Line:
    """What is known of a cell at a rate, or over all nets.

    rate: None over all nets, for each has its own. accuracies: of the seeds that were run. loss:
    the mean over the last epoch of those that did not diverge. difference: None for the base
    itself. diverged: runs whose loss was not finite at the end.
    """

    cell: Cell
    rate: float | None
    accuracies: tuple[float, ...]
    loss: float | None
    similarity: float | None
    diverged: int
    difference: Difference | None

    @property
    def mean(self) -> float:
        return mean(self.accuracies)


def lines(question: Question, records: Records) -> list[Line]:
    """The cells with two runs or more; a base that is missing leaves a difference out."""
    found = list(_lines(question, records))
    return [*found, *_over_nets(question, found)]


def _lines(question: Question, records: Records) -> Iterator[Line]:
    for cell in question.cells():
        for rate in cell.rates(records):
            found = [records.known[run] for run in cell.measured(rate) if run in records.known]
            if len(found) < FEWEST:
                continue
            yield Line(
                cell,
                rate,
                tuple(record["accuracy"] for record in found),
                _mean_known(found, "loss"),
                _mean_known(found, "similarity"),
                sum(record["loss"] is None for record in found),
                _difference(cell, rate, records),
            )


def _difference(cell: Cell, rate: float, records: Records) -> Difference | None:
    """To the base: at its own rate where rates are chosen, at the same one where they are not."""
    base = cell.base()
    if base == cell:
        return None
    rates = base.rates(records) if cell.question.is_tuned else (rate,)
    if not rates:
        return None
    pairs = [
        (records.accuracy(own), records.accuracy(other))
        for own, other in zip(cell.measured(rate), base.measured(rates[0]), strict=True)
        if own in records.known and other in records.known
    ]
    return paired(*zip(*pairs, strict=True)) if len(pairs) >= FEWEST else None


def _mean_known(found: list[Record], name: str) -> float | None:
    values = [record[name] for record in found if record[name] is not None]
    return mean(values) if values else None


def _over_nets(question: Question, found: list[Line]) -> Iterator[Line]:
    """Each arm's mean over the nets, seed by seed: all nets share the seeds, which stay the pairs.

    Only where there are several, and an arm was measured on each with all seeds.
    """
    if len(question.nets) < 2 or not question.is_tuned:
        return
    cells = list(replace(question, nets=question.nets[:1]).cells())
    own = {_name(c): [line for line in found if _name(line.cell) == _name(c)] for c in cells}
    means = {
        name: tuple(map(mean, zip(*(line.accuracies for line in every), strict=True)))
        for name, every in own.items()
        if len(every) == len(question.nets)
        and all(len(line.accuracies) == len(SEEDS) for line in every)
    }
    for cell in cells:
        if (name := _name(cell)) not in means:
            continue
        base = cell.base()
        known = None if base == cell else means.get(_name(base))
        every = [{"loss": line.loss, "similarity": line.similarity} for line in own[name]]
        yield Line(
            replace(cell, net=ALL_NETS),
            None,
            means[name],
            _mean_known(every, "loss"),
            _mean_known(every, "similarity"),
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
            "-" if line.loss is None else f"{line.loss:.3f}",
            f"{line.mean:.2f} ± {stdev(line.accuracies):.2f}",
            _difference_of(line),
            interval(line.difference),
            _pairs(line),
            _says(line),
            "-" if line.similarity is None else f"{line.similarity:.3f}",
        )
        for line in found
    ]


def table(found: list[Line]) -> list[tuple[str, ...]]:
    """The heads and the rows, without the columns in which nothing stands.

    Nor how many pairs there are, where each line has all of them.
    """
    every = rows(found)
    if all(line.difference is None or line.difference.n == len(SEEDS) for line in found):
        every = [(*row[:_PAIRS], "-", *row[_PAIRS + 1 :]) for row in every]
    kept = [i for i in range(len(COLUMNS)) if any(row[i] != "-" for row in every)]
    return [tuple(row[i] for i in kept) for row in (COLUMNS, *every)]


def _difference_of(line: Line) -> str:
    if line.difference:
        return f"{line.difference.mean:+.2f}"
    return "base" if line.cell.base() == line.cell else "-"  # - : the base was not made yet


def interval(difference: Difference | None) -> str:
    return f"{difference.low:+.2f} to {difference.high:+.2f}" if difference else "-"


def _pairs(line: Line) -> str:
    return str(line.difference.n) if line.difference else "-"


def _says(line: Line) -> str:
    if line.diverged:
        return f"{line.diverged} of {len(line.accuracies)} diverged"
    return line.difference.verdict if line.difference else "-"


def section(name: str, question: Question, records: Records) -> str:
    """An answered question's part of the page; it says how many of its runs are missing."""
    found = lines(question, records)
    made, total = progress(question, records)
    text = [f"### {question.title}", "", f"{question.asks} `--question {name}`", ""]
    if made < total:
        text += [f"{made} of {total} runs are done; the table leaves out the others.", ""]
    return "\n".join((*text, markdown(table(found)), ""))


def open_questions(asked: Mapping[str, Question], records: Records) -> str:
    """Those in which nothing is compared yet, and how many runs they need, as far as known."""
    heads = ("question", "asks", "runs")
    rows = [
        (f"`{name}`", f"{question.title} {question.asks}", str(progress(question, records)[1]))
        for name, question in asked.items()
    ]
    return "\n".join(("### Not answered yet", "", markdown([heads, *rows]), ""))


def markdown(cells: list[tuple[str, ...]]) -> str:
    head, *body = cells
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ("---",) * len(head), *body])


def proposition() -> str:
    """Proposition 1 in numbers, made anew each time: it takes a second."""
    without, with_scales = (largest_departure(scales=scales) for scales in (False, True))
    return "\n".join(
        (
            "### Without scaling layers, branches are a learning rate",
            "",
            f"Proposition 1: over {STEPS} steps of SGD in float64, {BRANCHES} branches without",
            f"scaling layers stay within {without:.0e} of one conv that learns {BRANCHES} times as",
            f"fast. With a scaling layer after each, they differ from it by {with_scales:.0e}.",
            "",
        )
    )


def legend() -> str:
    """What each arm is."""
    return markdown([("arm", "what it is"), *((name, arm.means) for name, arm in ARMS.items())])
