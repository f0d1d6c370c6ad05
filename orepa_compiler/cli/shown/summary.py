"""Sums up an export: the table, the lines on stderr, the JSON and the exit code."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orepa_compiler.cli.given.export_request import ExportRequest
from orepa_compiler.cli.given.options import ExitCode
from orepa_compiler.cli.run.steps import ExportStep
from orepa_compiler.cli.shown.junit import Case, Outcome, write_junit
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.manifest import versions
from orepa_compiler.export.onnx.external_data import sha256
from orepa_compiler.files.atomic import staged
from orepa_compiler.verification import Report
from orepa_compiler.verification.divergence import Divergence, half_blocks, plain_map

# Wide enough for a path in every row where no terminal says how wide it is.
WIDTH_OF_A_PIPE = 120


def verdict(steps: Sequence[ExportStep]) -> ExitCode:
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


def show_steps(steps: Sequence[ExportStep]) -> None:
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
        # As Text: brackets in a message are no markup.
        table.add_row(*map(Text, (step.name, str(step.file or ""), size, error, said)))
    console.print(table)
    for step in steps:
        if step.verdict == "mismatch" and step.report is not None:
            console.print(str(step.report), markup=False, highlight=False)
        if step.divergence is not None:
            show_divergence(console, step.divergence)
        if step.audit is not None and not step.audit:
            console.print(step.audit)


def show_divergence(console: Console, found: Divergence | str) -> None:
    """Where a comparison first fails, with the picture of the error where there is a map."""
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    if isinstance(found, Divergence) and found.error_map:
        picture = half_blocks if console.is_terminal else plain_map
        console.print(picture(found.error_map), markup=False, highlight=False)


def cases(steps: Sequence[ExportStep]) -> list[Case]:
    """The steps as the cases of a JUnit file; what is due and was not run is an error there."""
    outcomes: dict[str, Outcome] = {"mismatch": "failure", "failed": "error"}
    found = []
    for step in steps:
        outcome: Outcome = outcomes.get(step.verdict, "pass")
        if step.verdict == "not run":
            outcome = "error" if step.is_required else "skipped"
        why = ": ".join(_why(step)) or step.note
        text = "\n\n".join(str(part) for part in (step.report, step.divergence) if part is not None)
        found.append(Case(step.name, outcome, why, text, step.seconds))
    return found


def cases_of_report(report: Report, found: Divergence | str | None) -> list[Case]:
    """Each output of each batch as the case of a JUnit file."""
    if not report.rows:
        return [Case("nothing", "error", report.verdict)]
    extra = "" if found is None else f"\n\n{found}"
    return [
        Case(
            row.where,
            "pass" if row.ok else "failure",
            row.reason,
            "" if row.ok else f"{row}{extra}",
        )
        for row in report.rows
    ]


def complaints(steps: Sequence[ExportStep]) -> list[str]:
    """One line for each step that failed, differs or could not be made."""
    return [
        ": ".join((step.name, step.verdict, *_why(step)))
        for step in steps
        if step.is_required and step.verdict in ("failed", "mismatch", "not run")
    ]


def _why(step: ExportStep) -> list[str]:
    report = [step.report.verdict] if step.report is not None else []
    return report + ([_reason(step.cause)] if step.cause else [])


def _reason(cause: Exception) -> str:
    text = " ".join(str(cause).split())
    return text if isinstance(cause, ReparamError) else f"{type(cause).__name__}: {text}"


def report_of(request: ExportRequest, steps: Sequence[ExportStep]) -> dict[str, Any]:
    """All that an export did, as plain data."""
    return {**recheck_report(steps), "request": asdict(request)}


def recheck_report(steps: Sequence[ExportStep]) -> dict[str, Any]:
    """All that the steps found, as plain data."""
    code = verdict(steps)
    return {
        "verdict": code.name.lower(),
        "exit_code": int(code),
        "steps": [_step_data(step) for step in steps],
        "versions": versions(),
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """The data as a JSON file, whole or not at all."""
    with staged(path) as file:
        file.write_text(json.dumps(data, indent=2, default=str, allow_nan=False) + "\n")


def _step_data(step: ExportStep) -> dict[str, Any]:
    data: dict[str, Any] = {"step": step.name, "verdict": step.verdict, "note": step.note}
    data["seconds"] = round(step.seconds, 3)
    if step.file is not None:
        data |= {"file": str(step.file), "bytes": step.file.stat().st_size}
        data["sha256"] = sha256(step.file)
    if step.report is not None:
        data["report"] = step.report.to_dict()
        # JSON has no inf, which stands for an output that could not be compared at all.
        data["error"] = step.error if step.error is not None and isfinite(step.error) else None
    if step.certificate is not None:
        data["certificate"] = step.certificate.to_dict()
    if step.divergence is not None:
        data["divergence"] = divergence_data(step.divergence)
    if step.scores:
        data["scores"] = step.scores
    if step.audit is not None:
        data["audit"] = step.audit.to_dict()
    if step.cause is not None:
        data["reason"] = _reason(step.cause)
    return data


def divergence_data(found: Divergence | str) -> dict[str, Any]:
    """Where a comparison first fails, or why that cannot be told, as plain data."""
    return found.to_dict() if isinstance(found, Divergence) else {"reason": found}


def finish(suite: str, steps: Sequence[ExportStep], junit: Path | None, debug: bool) -> int:
    show_steps(steps)
    if junit:
        write_junit(junit, suite, cases(steps))
    for step in steps:
        if debug and step.cause:
            traceback.print_exception(step.cause)
    for line in complaints(steps):
        print(line, file=sys.stderr)
    return verdict(steps)
