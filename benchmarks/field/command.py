"""python -m benchmarks.field: collapses every block and model, prints a table, writes the page."""

from __future__ import annotations

import fnmatch
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
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
    from benchmarks.field.peers import examine_peer, peers
    from benchmarks.field.report import report, table
    from benchmarks.zoo.results import environment, source_version, write_whole

ROOT = Path(__file__).parents[2]

app = typer.Typer(add_completion=False)


@app.command()
def field(
    only: Annotated[str, typer.Option(help="Rows by name, with * for any text.")] = "*",
    timm: Annotated[bool, typer.Option(help="Also timm's models: some minutes.")] = True,
    output: Annotated[Path, typer.Option()] = ROOT / "benchmarks/results/field.json",
    docs: Annotated[Path, typer.Option()] = ROOT / "docs/field.md",
) -> None:
    """Collapse every published block, and timm's models beside timm's own way.

    With --only or --no-timm the table is printed and nothing is written.
    """
    torch.set_num_threads(1)
    tasks = [(name, task) for name, task in _tasks(timm) if fnmatch.fnmatch(name, only)]
    errors = Console(stderr=True)
    rows: list[Row] = []
    for _, task in track(tasks, "field", console=errors, disable=not errors.is_terminal):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(task())
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows))
    if timm and only == "*":
        facts = environment(f"python -m benchmarks.field {shlex.join(sys.argv[1:])}".strip())
        facts["source"] = source_version()
        write_whole(output, _as_json(rows, facts))
        write_whole(docs, report(rows, facts))
    raise typer.Exit(1 if any(row["status"] == "fail" for row in rows) else 0)


def _tasks(timm: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    for name, block in BLOCKS.items():
        yield name, partial(examine_block, block)
    for subject, classes in (peers() if timm else {}).items():
        yield subject.name, partial(examine_peer, subject, classes)


def _as_json(rows: list[Row], facts: dict[str, Any]) -> str:
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"environment": {json.dumps(facts)},\n"rows": [\n{lines}\n]}}\n'
