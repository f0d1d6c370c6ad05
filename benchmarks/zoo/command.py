"""The command line of the zoo."""

from __future__ import annotations

import random
import shlex
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from orepa_compiler.model_source import declare_torchvision_operators

declare_torchvision_operators()  # before anything imports torchvision

with warnings.catch_warnings():  # timm's and torchvision's own, of models that they deprecate
    warnings.simplefilter("ignore")
    from benchmarks.libraries.report import with_section
    from benchmarks.zoo import detection, values
    from benchmarks.zoo.building import subjects
    from benchmarks.zoo.examining import Limits, Row, examine
    from benchmarks.zoo.figures import draw
    from benchmarks.zoo.report import report, why_of
    from benchmarks.zoo.results import (
        FAILED,
        REDO,
        Results,
        environment,
        key_of,
        source_version,
        write_whole,
    )
    from benchmarks.zoo.running import run_all

app = typer.Typer(add_completion=False)
_GLOB = "Models: timm:NAME, torchvision:NAME or NAME, with * for any text; may be repeated."
_ROWS_A_LINE = 25  # where no terminal shows a bar: one line for so many rows


@app.command()
def zoo(
    only: Annotated[list[str] | None, typer.Option(help=_GLOB)] = None,
    jobs: Annotated[int, typer.Option(help="Models at a time.")] = 2,
    limit_seconds: Annotated[float, typer.Option(help="Of one model.")] = 900,
    limit_gb: Annotated[float, typer.Option(help="Of one model.")] = 10,
    most_convs: Annotated[int, typer.Option(help="Check deeper models depth-reduced.")] = 10**6,
    most_parameters: Annotated[float, typer.Option(help="In millions; the same.")] = 10**6,
    redo: Annotated[str, typer.Option(help=f"Rows to make again: {', '.join(REDO)}.")] = "none",
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/zoo.json"),
    docs: Annotated[Path, typer.Option()] = Path("docs/zoo.md"),
) -> None:
    """Expand, train a step, collapse and compare every model of timm and torchvision.

    Rows that the output already holds are kept; the run can be interrupted and continued. With
    nothing left to do the page and its figures are made again.
    """
    if redo not in REDO:
        raise typer.BadParameter(f"{redo!r} is none of {', '.join(REDO)}", param_hint="--redo")
    results, source = Results(output), source_version()
    due = [s for s in subjects(*(only or ["*"])) if results.is_due(s.key, redo, source)]
    if due:
        command = f"python -m benchmarks.zoo {shlex.join(sys.argv[1:])}".strip()
        results.environment = {**environment(command), "source": source}
    random.Random(0).shuffle(due)  # the rows of an interrupted run are a fair sample
    due.sort(key=lambda subject: results.urgency(subject.key))
    limits = Limits(limit_seconds, limit_gb * 1e9, most_convs, most_parameters * 1e6)
    detection.provide_suppression()
    values.warm()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends as an interrupted run does
    with _Display(len(due)) as display:
        try:
            for row in run_all(due, examine, limits, jobs=jobs, idle=display.running):
                results.add({**row, "source": source})
                display.finished(row)
        finally:
            results.save()
            page = report(results.rows.values(), results.environment)
            write_whole(docs, with_section(page))
            draw([*results.rows.values()], docs.with_suffix(""))
    bad = [row for row in results.rows.values() if row["status"] in FAILED]
    display.console.print(f"{len(results.rows)} rows, {len(bad)} failed: {output}, {docs}")
    raise typer.Exit(1 if bad else 0)


class _Display:
    """A bar with counts where stderr is a terminal; a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self.console = Console(stderr=True)
        self.counts: Counter[str] = Counter()
        self.total = total
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[names]}", style="dim"),
        )
        # Drawn by hand: a thread that draws could hold a lock while a process is forked.
        self.progress = Progress(*columns, console=self.console, auto_refresh=False)
        self.task = self.progress.add_task("", total=total, counts="", names="")

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def running(self, names: Sequence[str]) -> None:
        if self.console.is_terminal:
            self.progress.update(self.task, names=", ".join(names), refresh=True)

    def finished(self, row: Row) -> None:
        self.counts[row["status"]] += 1
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        self.progress.update(self.task, advance=1, counts=counts)
        show = partial(self.progress.console.print, highlight=False, soft_wrap=True)
        if row["status"] not in ("pass", "no conv"):
            show(
                f"{key_of(row)}: {row['status']} {why_of(row)}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        done = sum(self.counts.values())
        if not self.console.is_terminal and (done % _ROWS_A_LINE == 0 or done == self.total):
            show(f"{done} of {self.total}: {counts}")
