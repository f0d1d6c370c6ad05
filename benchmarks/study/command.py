"""python -m benchmarks.study: makes what is missing, prints what is known, writes the page."""

from __future__ import annotations

import fnmatch
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.study.budget import time_section
from benchmarks.study.cells import SEEDS, Question, needed
from benchmarks.study.data import FASHION, FASHION_FOLDER, SOURCES
from benchmarks.study.figures import draw
from benchmarks.study.nets import NETS
from benchmarks.study.questions import FASHION_QUESTIONS, QUESTIONS, SMALL_QUESTIONS
from benchmarks.study.report import legend, lines, open_questions, proposition, section, table
from benchmarks.study.runs import Record, Records, Run
from benchmarks.study.training import train
from orepa_compiler.files.atomic import staged

ROOT = Path(__file__).parents[2]

app = typer.Typer(add_completion=False)


@app.command()
def study(
    question: Annotated[
        list[str] | None, typer.Option(help=f"One or several of: {', '.join(QUESTIONS)}.")
    ] = None,
    data: Annotated[str, typer.Option(help=f"Only these images: {', '.join(SOURCES)}.")] = "*",
    net: Annotated[str, typer.Option(help="Only nets with such a name, * for any text.")] = "*",
    setting: Annotated[str, typer.Option(help="Only such settings, as '4 epochs'.")] = "*",
    seeds: Annotated[int, typer.Option(help="No more than so many pairs.")] = len(SEEDS),
    fashion: Annotated[
        Path, typer.Option(help="Where the files of Fashion-MNIST are.", envvar=FASHION_FOLDER)
    ] = Path(FASHION),
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
    os.environ[FASHION_FOLDER] = str(fashion)  # for the processes that train
    named = {name: QUESTIONS[name] for name in question or QUESTIONS}
    about = {name: asked for name, asked in named.items() if fnmatch.fnmatch(asked.data, data)}
    chosen = {name: _only(asked, net, setting) for name, asked in about.items()}
    if not any(list(asked.cells()) for asked in chosen.values()):
        raise typer.BadParameter(
            f"nothing is asked there of data {data!r}, net {net!r} and setting {setting!r}; "
            f"the data are {', '.join(SOURCES)}, the nets {', '.join(NETS)}"
        )
    known = Records(records)
    if not summary:
        _make(chosen, known, jobs, most, seeds, console)
    for asked in chosen.values():
        console.print(_table(asked, known))
    write_page(known, docs)


def _only(asked: Question, net: str, setting: str) -> Question:
    settings = {name: asked.settings[name] for name in fnmatch.filter(asked.settings, setting)}
    return replace(asked, nets=tuple(fnmatch.filter(asked.nets, net)), settings=settings)


def _make(
    chosen: dict[str, Question],
    known: Records,
    jobs: int,
    most: int | None,
    seeds: int,
    console: Console,
) -> None:
    """Every run that is missing: those that tune first, for the others hang on them."""
    left = most
    with Progress(console=console) as progress:
        while runs := [
            run
            for asked in chosen.values()
            for run in needed(asked, known)
            if run.held == "validation" or run.seed < seeds
        ][:left]:
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
    """The parts of the page between their marks, and the figure beside it."""
    ends = (proposition(), "## The arms", "", legend(), "")
    parts = {
        "small nets": [*_sections(FASHION_QUESTIONS, known, page)],
        "few images": [*_sections(SMALL_QUESTIONS, known, page), *ends],
    }
    whole = page.read_text() if page.exists() else "\n".join(map("".join, map(_marks, parts)))
    for name, part in parts.items():
        begin, end = _marks(name)
        before, rest = whole.split(begin)
        whole = before + begin + "\n".join(part) + end + rest.split(end)[1]
    with staged(page) as draft:
        draft.write_text(whole)


def _marks(part: str) -> tuple[str, str]:
    return f"<!-- study: {part}: begin -->\n", f"<!-- study: {part}: end -->\n"


def _sections(asked: Mapping[str, Question], known: Records, page: Path) -> Iterator[str]:
    unanswered: dict[str, Question] = {}
    for name, question in asked.items():
        found = lines(question, known)
        if not any(line.difference for line in found):
            unanswered[name] = question
            continue
        yield section(name, question, known)
        if question.is_over_budgets:
            draw(found, page.parent / "evidence" / f"{name}.svg")
            yield time_section(question, known)
    if unanswered:
        yield open_questions(unanswered, known)
