"""What an export came to: the table, the lines on stderr, the JSON and the exit code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from orepa_compiler import __version__
from orepa_compiler.cli.arguments import ExitCode
from orepa_compiler.cli.stages import ExportRequest, Step
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.atomic import staged

# Wide enough for a path in every row where no terminal says how wide it is.
WIDTH_OF_A_PIPE = 120


def verdict(steps: Sequence[Step]) -> ExitCode:
    """The worst that the steps say; a check that did not run is not a pass."""
    verdicts = {step.verdict for step in steps if step.is_required}
    for found, code in (
        ("failed", ExitCode.EXPORT_FAILED),
        ("mismatch", ExitCode.MISMATCH),
        ("not run", ExitCode.NOT_VERIFIED),
    ):
        if found in verdicts:
            return code
    return ExitCode.PASS


def show_steps(steps: Sequence[Step]) -> None:
    """Prints one row for each step, and all that is known of a mismatch."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_PIPE
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "file", "bytes", "error", "verdict"):
        justify: Literal["left", "right"] = "right" if column in ("bytes", "error") else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for step in steps:
        size = f"{step.file.stat().st_size:,}" if step.file else ""
        error = "" if step.error is None else f"{step.error:.1e}"
        said = f"{step.verdict}  {step.note}" if step.note else step.verdict
        table.add_row(step.name, str(step.file or ""), size, error, said)
    console.print(table)
    for step in steps:
        if step.verdict == "mismatch":
            console.print(str(step.report), markup=False, highlight=False)


def complaints(steps: Sequence[Step]) -> list[str]:
    """One line for each step that failed, differs or could not be made."""
    return [
        ": ".join((step.name, step.verdict, *_why(step)))
        for step in steps
        if step.is_required and step.verdict in ("failed", "mismatch", "not run")
    ]


def _why(step: Step) -> list[str]:
    report = [step.report.verdict] if step.report is not None else []
    return report + ([_reason(step.cause)] if step.cause else [])


def _reason(cause: Exception) -> str:
    text = " ".join(str(cause).split())
    return text if isinstance(cause, ReparamError) else f"{type(cause).__name__}: {text}"


def report_of(request: ExportRequest, steps: Sequence[Step]) -> dict[str, Any]:
    """All that an export did, as plain data."""
    code = verdict(steps)
    return {
        "verdict": code.name.lower(),
        "exit_code": int(code),
        "request": asdict(request),
        "steps": [_step_data(step) for step in steps],
        "versions": {"orepa-compiler": __version__, "torch": torch.__version__},
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """The data as a JSON file, whole or not at all."""
    with staged(path) as file:
        file.write_text(json.dumps(data, indent=2, default=str, allow_nan=False) + "\n")


def _step_data(step: Step) -> dict[str, Any]:
    data: dict[str, Any] = {"step": step.name, "verdict": step.verdict, "note": step.note}
    if step.file is not None:
        content = step.file.read_bytes()
        data |= {"file": str(step.file), "bytes": len(content)}
        data["sha256"] = hashlib.sha256(content).hexdigest()
    if step.report is not None:
        data["report"] = step.report.to_dict()
        # JSON has no inf, which stands for an output that could not be compared at all.
        data["error"] = step.error if step.error is not None and isfinite(step.error) else None
    if step.cause is not None:
        data["reason"] = _reason(step.cause)
    return data
