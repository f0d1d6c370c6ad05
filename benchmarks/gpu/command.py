"""python -m benchmarks.gpu: every model in every precision; rows that were run are kept."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.gpu.measuring import MODELS, PRECISION_NAMES, Row, measure, why_not_here
from benchmarks.gpu.report import page
from orepa_compiler.export.manifest import versions
from orepa_compiler.files.atomic import staged

ROOT = Path(__file__).parents[2]

app = typer.Typer(add_completion=False)


@app.command()
def gpu(
    redo: Annotated[bool, typer.Option("--redo", help="Run rows again that were run.")] = False,
    batch: Annotated[int, typer.Option(min=1, max=32, help="Of the latencies.")] = 1,
    output: Annotated[Path, typer.Option()] = ROOT / "benchmarks/results/gpu.json",
    docs: Annotated[Path, typer.Option()] = ROOT / "docs/gpu.md",
) -> None:
    """Build, compare and time the engines of five models in three precisions.

    Without a GPU every row that was not run says so, and why. The exit code is 1 where a row failed
    or differs, 4 where one was not run.
    """
    console = Console(stderr=True)
    rows = {} if redo else _known(output)
    missing = why_not_here()
    for name, source in MODELS.items():
        for precision in PRECISION_NAMES:
            if (name, precision) in rows:
                continue
            console.print(f"{name} {precision}: {missing or 'running'}")
            if missing:
                rows[name, precision] = Row(name, precision, "not run", missing)
            else:
                rows[name, precision] = measure(name, source, precision, batch=batch)
            _write(rows, output, docs)
    _write(rows, output, docs)
    raise typer.Exit(exit_code(list(rows.values())))


def exit_code(rows: list[Row]) -> int:
    """1 where a row failed or differs, else 4 where one was not run, else 0."""
    verdicts = {check.verdict for row in rows for check in row.checks.values()}
    states = {row.state for row in rows}
    if {"failed", "mismatch"} & (verdicts | states):
        return 1
    return 4 if "not run" in verdicts | states else 0


def _known(output: Path) -> dict[tuple[str, str], Row]:
    """The rows that were run: what was not, or failed, is tried again."""
    if not output.is_file():
        return {}
    rows = [Row.from_dict(row) for row in json.loads(output.read_text())["rows"]]
    return {(row.model, row.precision): row for row in rows if row.state == "done"}


def _write(rows: dict[tuple[str, str], Row], output: Path, docs: Path) -> None:
    order = [(name, precision) for name in MODELS for precision in PRECISION_NAMES]
    shown = [rows.get(key, Row(*key, "not run", "not reached yet")) for key in order]
    facts = _facts()
    data = {"machine": facts, "rows": [row.to_dict() for row in shown]}
    for path, text in ((output, json.dumps(data, indent=1) + "\n"), (docs, page(shown, facts))):
        with staged(path) as draft:
            draft.write_text(text)


def _facts() -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    return {
        "command": f"python -m benchmarks.gpu {shlex.join(sys.argv[1:])}".strip(),
        "GPU": torch.cuda.get_device_name() if has_gpu else "none",
        **{name: version for name, version in versions().items() if name != "platform"},
    }
