"""`orepa verify A B`: the verdict, the first module that differs, and the files that say so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from torch import Tensor

from orepa_compiler.choices import Weights
from orepa_compiler.cli.given.inputs import load_inputs
from orepa_compiler.cli.given.models import random_inputs
from orepa_compiler.cli.given.options import ExitCode, NotVerified
from orepa_compiler.cli.run.named_sides import check_checkpoint, inputs_of_files, load_side
from orepa_compiler.cli.shown.junit import write_junit
from orepa_compiler.cli.shown.pages import page_of_comparison
from orepa_compiler.cli.shown.summary import (
    cases_of_report,
    divergence_data,
    show_divergence,
    write_json,
)
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.manifest import versions
from orepa_compiler.progress import announced
from orepa_compiler.proving.locating import explain_report
from orepa_compiler.proving.sides import verify
from orepa_compiler.report import write_page
from orepa_compiler.report.picture import save_picture
from orepa_compiler.verification import Report
from orepa_compiler.verification.divergence import Divergence

Batch = tuple[Tensor, ...]

# Of a model, where neither a shape nor a file says another.
DEFAULT_SHAPE = (3, 224, 224)


def compare_sides(
    reference: tuple[str, Path | None],
    candidate: tuple[str, Path | None],
    *,
    data: str | None,
    shapes: Sequence[tuple[int, ...]],
    batch: int,
    stress: bool,
    precision: str | None,
    allow_pickle: bool,
    weights: Weights | None = None,
    json: Path | None,
    junit: Path | None,
    picture: Path | None,
    page: Path | None = None,
    command: str = "",
) -> ExitCode:
    """The exit code of a comparison, after all of it is shown and written.

    reference, candidate: what each is, and its checkpoint. command: as it was given.
    Raises ReparamError for a mistake, and NotVerified where the comparison cannot be made.
    """
    for side in (reference, candidate):
        check_checkpoint(*side)
    if precision == "int8" and data is None:
        raise ReparamError(
            "--precision int8 is judged on your own data, because its ranges come from it: give "
            "--inputs"
        )
    inputs = _inputs((reference[0], candidate[0]), data, shapes, batch)
    left = load_side(*reference, inputs=inputs[0], allow_pickle=allow_pickle, weights=weights)
    right = load_side(*candidate, inputs=inputs[0], allow_pickle=allow_pickle, weights=weights)
    with announced("comparing"):
        try:
            stress = stress and precision != "int8"  # its ranges are those of the user's data
            report = verify(left, right, inputs, precision=precision, stress=stress)
        except ReparamError as error:
            raise NotVerified(str(error)) from error
    # Every module of an int8 file is off; a note of the report names those that lose most.
    is_explained = bool(report) or precision == "int8"
    found = None if is_explained else _explained(left, right, inputs, report, precision)
    _show(report, found)
    if json:
        first = {} if found is None else {"divergence": divergence_data(found)}
        given = {"reference": reference[0], "candidate": candidate[0], "versions": versions()}
        write_json(json, {**report.to_dict(), **first, **given})
    if junit:
        write_junit(junit, "orepa-verify", cases_of_report(report, found))
    if page:
        sides = (reference[0], left), (candidate[0], right)
        shown = page_of_comparison(
            *sides, inputs=inputs, report=report, found=found, precision=precision, command=command
        )
        write_page(shown, page)
    if picture and isinstance(found, Divergence):
        save_picture(found, picture)
    return ExitCode.PASS if report else ExitCode.MISMATCH


def _inputs(
    sources: Sequence[str], data: str | None, shapes: Sequence[tuple[int, ...]], batch: int
) -> list[Batch]:
    """The user's own data; else random inputs of the shapes given, or of what a file takes."""
    if data:
        return load_inputs(data, batch)
    found = None if shapes else inputs_of_files(sources, batch)
    return [found or random_inputs(shapes or [DEFAULT_SHAPE], batch)]


def _explained(
    left: Any, right: Any, inputs: list[Batch], report: Report, precision: str | None
) -> Divergence | str | None:
    with announced("looking for the first module that differs"):
        return explain_report(left, right, inputs, report, precision=precision)


def _show(report: Report, found: Divergence | str | None) -> None:
    console = Console()
    # A pipe has no width; the text of a report has one of its own.
    console.print(report) if console.is_terminal else typer.echo(str(report))
    if found is not None:
        show_divergence(console, found)
