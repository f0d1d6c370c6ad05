"""python -m benchmarks.study: makes what is missing, prints what is known, writes the page."""

from __future__ import annotations

import fnmatch
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.study.figures import draw
from benchmarks.study.nets import NETS
from benchmarks.study.questions import QUESTIONS, Question, needed
from benchmarks.study.report import legend, lines, proposition, section, table
from benchmarks.study.runs import Record, Records, Run
from benchmarks.study.training import train
from orepa_compiler.atomic import staged

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- study: begin -->\n", "<!-- study: end -->\n"

app = typer.Typer(add_completion=False)


@app.command()
def study(
    question: Annotated[
        list[str] | None, typer.Option(help=f"One or several of: {', '.join(QUESTIONS)}.")
    ] = None,
    net: Annotated[str, typer.Option(help="Only nets with such a name, * for any text.")] = "*",
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.")] = 2,
    most: Annotated[int | None, typer.Option(help="No more than so many runs now.")] = None,
    summary: Annotated[bool, typer.Option(help="Make no run; write from what is there.")] = False,
    records: Annotated[Path, typer.Option()] = ROOT / "benchmarks/results/study.jsonl",
    docs: Annotated[Path, typer.Option()] = ROOT / "docs/evidence.md",
) -> None:
    """Train the paired runs of each question, and write their tables and figures.

    A run is a line of the records, written as it ends: a study that was stopped goes on.

        python -m benchmarks.study --question forms --net 'ResNet-*' --jobs 2
        python -m benchmarks.study --summary
    """
    console = Console()
    unknown = set(question or ()) - QUESTIONS.keys()
    if unknown:
        raise typer.BadParameter(f"no question {unknown.pop()!r}; there are {', '.join(QUESTIONS)}")
    chosen = {name: _with_nets(QUESTIONS[name], net) for name in question or QUESTIONS}
    if not any(asked.nets for asked in chosen.values()):
        raise typer.BadParameter(f"no net is named {net!r} there; the nets are {', '.join(NETS)}")
    known = Records(records)
    if not summary:
        _make(chosen, known, jobs, most, console)
    for asked in chosen.values():
        console.print(_table(asked, known))
    write_page(known, docs)


def _with_nets(asked: Question, pattern: str) -> Question:
    return replace(asked, nets=tuple(fnmatch.filter(asked.nets, pattern)))


def _make(
    chosen: dict[str, Question], known: Records, jobs: int, most: int | None, console: Console
) -> None:
    """Every run that is missing: those that tune first, for the others hang on them."""
    left = most
    with Progress(console=console) as progress:
        while runs := [run for asked in chosen.values() for run in needed(asked, known)][:left]:
            runs = list(dict.fromkeys(runs))
            task = progress.add_task("runs", total=len(runs))
            for run, found in _trained(runs, jobs):
                known.add(run, found)
                progress.advance(task)
            left = None if left is None else left - len(runs)


def _trained(runs: list[Run], jobs: int) -> Iterator[tuple[Run, Record]]:
    if jobs == 1:
        yield from map(_one, runs)
        return
    # spawned: a fork of a process whose torch has threads can hang
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(_one, runs)


def _one(run: Run) -> tuple[Run, dict[str, Any]]:
    torch.set_num_threads(1)
    return run, train(run)


def _table(asked: Question, known: Records) -> Table:
    made = Table(title=f"{asked.title} {asked.asks}", box=None, title_justify="left")
    heads, *rows = table(lines(asked, known))
    for head in heads:
        made.add_column(head)
    for row in rows:
        made.add_row(*row)
    return made


def write_page(known: Records, page: Path) -> None:
    """The part of the page between its marks, and the figures beside it."""
    parts = [section(name, asked, known) for name, asked in QUESTIONS.items()]
    for name, asked in QUESTIONS.items():
        if found := lines(asked, known):
            draw(found, page.parent / "evidence" / f"{name}.svg")
    made = "\n".join([*parts, proposition(), "## The arms", "", legend(), ""])
    whole = page.read_text() if page.exists() else f"{BEGIN}{END}"
    begin, end = whole.index(BEGIN) + len(BEGIN), whole.index(END)
    with staged(page) as draft:
        draft.write_text(whole[:begin] + made + whole[end:])
