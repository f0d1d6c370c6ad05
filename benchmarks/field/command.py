"""python -m benchmarks.field: collapses every block and model, prints a table, writes the page."""

from __future__ import annotations

import fnmatch
import json
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

with warnings.catch_warnings():  # timm's and torchvision's own, of models that they deprecate
    warnings.simplefilter("ignore")
    from benchmarks.field.blocks import BLOCKS
    from benchmarks.field.examining import Row, examine_block
    from benchmarks.field.peers import MOST_PARAMETERS, examine_peer, peers
    from benchmarks.field.report import has_failed, report, table
    from benchmarks.zoo.examining import Limits
    from benchmarks.zoo.results import environment, source_version, write_whole
    from benchmarks.zoo.running import run_all

ROOT = Path(__file__).parents[2]

app = typer.Typer(add_completion=False)


# Of one model's process.
LIMITS = Limits(seconds=900, memory=20e9)


@app.command()
def field(
    only: Annotated[str, typer.Option(help="Rows by name, with * for any text.")] = "*",
    timm: Annotated[bool, typer.Option(help="Also timm's models: half an hour.")] = True,
    jobs: Annotated[int, typer.Option(help="Models of timm at a time.")] = 2,
    output: Annotated[Path, typer.Option()] = ROOT / "benchmarks/results/field.json",
    docs: Annotated[Path, typer.Option()] = ROOT / "docs/field.md",
) -> None:
    """Collapse every published block, and timm's models beside timm's own way.

    With --only or --no-timm the table is printed and nothing is written. Else a run that was
    interrupted goes on, as long as the library is the same.
    """
    torch.set_num_threads(1)
    writes = timm and only == "*"
    rows = _blocks(only)
    facts = environment(f"python -m benchmarks.field {shlex.join(sys.argv[1:])}".strip())
    facts["source"] = source_version()
    if timm:
        keep = partial(_write, output, facts) if writes else _forget
        rows = _models(rows, only, jobs, _known(output, facts["source"]) if writes else {}, keep)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows))
    if writes:
        _write(output, facts, rows)
        write_whole(docs, report(rows, facts))
    raise typer.Exit(1 if any(has_failed(row) for row in rows) else 0)


def _blocks(only: str) -> list[Row]:
    chosen = [block for name, block in BLOCKS.items() if fnmatch.fnmatch(name, only)]
    errors = Console(stderr=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            examine_block(block)
            for block in track(chosen, "blocks", console=errors, disable=not errors.is_terminal)
        ]


def _models(
    rows: list[Row],
    only: str,
    jobs: int,
    known: dict[str, Row],
    keep: Callable[[list[Row]], None],
) -> list[Row]:
    """The rows with those of timm's models, each made in a process of its own."""
    small, large = (
        [subject for subject in part if fnmatch.fnmatch(subject.name, only)] for part in peers()
    )
    rows = [*rows, *(known[s.name] for s in small if s.name in known)]
    missing = [subject for subject in small if subject.name not in known]
    made = run_all(missing, examine_peer, LIMITS, jobs=jobs)
    errors = Console(stderr=True)
    shown = track(made, "timm", len(missing), console=errors, disable=not errors.is_terminal)
    for row in shown:
        rows.append({"kind": "timm", **row})
        keep(rows)
    why = f"more than {MOST_PARAMETERS / 1e6:g} M parameters"
    unrun = [{"kind": "timm", "name": s.name, "status": "not run", "why": why} for s in large]
    return [*sorted(rows, key=_place), *unrun]


def _place(row: Row) -> tuple[bool, str]:
    """Blocks first, as they come; then the models by name."""
    return row["kind"] == "timm", row["name"] if row["kind"] == "timm" else ""


def _known(path: Path, source: str) -> dict[str, Row]:
    """The rows of timm's models that this version of the library made before."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["environment"].get("source") != source:
        return {}
    return {row["name"]: row for row in found["rows"] if row["kind"] == "timm" and "after" in row}


def _write(path: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_whole(path, f'{{"environment": {json.dumps(facts)},\n"rows": [\n{lines}\n]}}\n')


def _forget(rows: list[Row]) -> None:
    """Where nothing is written."""
