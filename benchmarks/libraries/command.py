"""The command line of the libraries."""

from __future__ import annotations

import fnmatch
import importlib.util
import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from orepa_compiler.model_source import declare_torchvision_operators

declare_torchvision_operators()  # before anything imports torchvision

from benchmarks.libraries.catalogue import entries  # noqa: E402
from benchmarks.libraries.examining import examine  # noqa: E402
from benchmarks.libraries.report import RESULTS, with_section  # noqa: E402
from benchmarks.zoo.building import Subject  # noqa: E402
from benchmarks.zoo.examining import Limits  # noqa: E402
from benchmarks.zoo.report import why_of  # noqa: E402
from benchmarks.zoo.results import (  # noqa: E402
    FAILED,
    REDO,
    Results,
    environment,
    key_of,
    write_whole,
)
from benchmarks.zoo.running import run_all  # noqa: E402

app = typer.Typer(add_completion=False)


@app.command()
def libraries(
    only: Annotated[list[str] | None, typer.Option(help="Globs on library:name.")] = None,
    jobs: Annotated[int, typer.Option(help="Models at a time.")] = 1,
    limit_seconds: Annotated[float, typer.Option(help="Of one model.")] = 900,
    limit_gb: Annotated[float, typer.Option(help="Of one model.")] = 10,
    redo: Annotated[str, typer.Option(help=f"Rows to make again: {', '.join(REDO)}.")] = "none",
    exports: Annotated[bool, typer.Option(help="Export each, beside torch's own.")] = True,
    output: Annotated[Path, typer.Option()] = RESULTS,
    docs: Annotated[Path, typer.Option()] = Path("docs/zoo.md"),
) -> None:
    """Expand, collapse, compare and export models of the libraries that are installed.

    Each in a process of its own. Rows that the output holds are kept, so that a run can be
    interrupted and continued.
    """
    results = Results(output)
    chosen = [
        e for key, e in entries().items() if any(fnmatch.fnmatch(key, g) for g in only or "*")
    ]
    there = [e for e in chosen if importlib.util.find_spec(e.library) is not None]
    for library in sorted({e.library for e in chosen} - {e.library for e in there}):
        typer.echo(f"{library} is not installed, its models are left out", err=True)
    due = [Subject(e.library, e.name, e.library) for e in there]
    due = [subject for subject in due if results.is_due(subject.key, redo, "")]
    if due:
        results.environment = environment(
            f"python -m benchmarks.libraries {shlex.join(sys.argv[1:])}"
        )
        for entry in (e for e in there if any(s.key == f"{e.library}:{e.name}" for s in due)):
            with suppress(Exception):  # its row will say what is wrong
                entry.ready()  # once for all processes
    limits = Limits(limit_seconds, limit_gb * 1e9)
    try:
        for row in run_all(due, partial(examine, exports=exports), limits, jobs=jobs):
            results.add(row)
            typer.echo(f"{key_of(row)}: {row['status']} {why_of(row)} {row['total_s']} s", err=True)
    finally:
        results.save()
        write_whole(docs, with_section(docs.read_text() if docs.exists() else "", output))
    bad = [row for row in results.rows.values() if row["status"] in FAILED]
    raise typer.Exit(1 if bad else 0)
