"""python -m benchmarks.gpu_day --minutes 9: each row is written as it is done."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.gpu_day.report import BEGIN, END, page
from benchmarks.gpu_day.rows import REHEARSAL, Row, Scale, rows, run
from benchmarks.step.results import machine
from orepa_compiler.files.atomic import staged

ROOT = Path(__file__).parents[2]

app = typer.Typer(add_completion=False)


@app.command()
def day(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal.")] = "cuda",
    minutes: Annotated[float, typer.Option(min=0.1, help="No row begins after so many.")] = 9.0,
    redo: Annotated[bool, typer.Option("--redo", help="Run rows again that were run.")] = False,
    output: Annotated[Path | None, typer.Option(help="The results.")] = None,
    docs: Annotated[Path | None, typer.Option(help="The page to put the table in.")] = None,
) -> None:
    """The rows that only a GPU can make, the most telling first; what was run is kept.

    On the CPU the same rows as a rehearsal, small, into results of their own and no page. The exit
    code is 1 where a row failed or differs, 4 where one was not run.
    """
    console = Console(stderr=True)
    is_rehearsal = device == "cpu"
    name = "gpu_day_rehearsal.json" if is_rehearsal else "gpu_day.json"
    output = output or ROOT / "benchmarks/results" / name
    docs = docs or (None if is_rehearsal else ROOT / "docs/performance.md")
    if not is_rehearsal and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA GPU here; --device cpu rehearses")
    known = {} if redo else _known(output)
    made: list[Row] = []
    start = time.perf_counter()
    for number, (title, work) in enumerate(rows(device, REHEARSAL if is_rehearsal else Scale())):
        if title in known:
            row = known[title]
        elif time.perf_counter() - start > 60 * minutes:
            row = Row(title, reason=f"{minutes:g} minutes were over")
        else:
            row = run(title, work)
            console.print(f"{title}: {row.state} {row.figures or row.reason} {row.seconds:.1f} s")
        made.append(row)
        _write(made, output, docs)
        assert number + 1 == len(made)
    raise typer.Exit(exit_code(made))


def exit_code(made: list[Row]) -> int:
    """1 where a row failed or differs, else 4 where one was not run, else 0."""
    states = {row.state for row in made} | {row.figures.get("verdict") for row in made}
    if {"failed", "differs"} & states:
        return 1
    return 4 if "not run" in states else 0


def _known(output: Path) -> dict[str, Row]:
    if not output.is_file():
        return {}
    found = [Row(**row) for row in json.loads(output.read_text())["rows"]]
    return {row.name: row for row in found if row.state == "done"}


def _write(made: list[Row], output: Path, docs: Path | None) -> None:
    facts: dict[str, Any] = machine()
    text = json.dumps({"machine": facts, "rows": [row.to_dict() for row in made]}, indent=1)
    output.parent.mkdir(parents=True, exist_ok=True)
    with staged(output) as draft:
        draft.write_text(text + "\n")
    if docs is None:
        return
    whole = docs.read_text()
    begin, end = whole.index(BEGIN) + len(BEGIN), whole.index(END)
    with staged(docs) as draft:
        draft.write_text(whole[:begin] + page(made, facts) + whole[end:])
