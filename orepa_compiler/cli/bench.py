"""`orepa bench`: how long a collapsed model takes beside the stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orepa_compiler.cli.given.options import (
    Debug,
    ExitCode,
    Json,
    Quiet,
    check_there,
    check_written,
)
from orepa_compiler.errors import ReparamError

# How often both files are timed in turn.
ROUNDS = 20


def bench_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The collapsed model.")],
    engine: Annotated[
        Path | None, typer.Argument(metavar="[ENGINE]", help="Its TensorRT engine.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="STOCK.onnx", help="What to compare it with.")
    ] = None,
    against_engine: Annotated[
        Path | None, typer.Option(metavar="STOCK.engine", help="The engine of that one.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one call.")] = 1,
    rounds: Annotated[int, typer.Option(min=6, help="How often both are timed in turn.")] = ROUNDS,
    gate: Annotated[
        bool,
        typer.Option(
            "--gate", help="Exit with 1 for another node count, or where MODEL is slower."
        ),
    ] = False,
    output: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """The latency of a collapsed model beside the stock one, both in turns, in one run.

    On onnxruntime's CPU, on CUDA and on TensorRT where they are here; what cannot run says why.

    Examples:

      orepa bench collapsed.onnx --against stock.onnx
      orepa bench collapsed.onnx collapsed.engine --against stock.onnx --against-engine stock.engine
      orepa bench nets/a.onnx --against nets/b.onnx --batch 8 --json latency.json

    A model is within noise of the other where the 95 % interval of the ratio of their times,
    round by round, holds 1. Stock nets of one architecture have its number of nodes: with --gate,
    another number, or a backend on which MODEL is slower, is a mismatch.
    """
    if against is None:
        raise ReparamError("nothing to compare with: give --against STOCK.onnx")
    check_written(json=output)
    check_there(a=model, b=engine, c=against, d=against_engine)
    from rich.console import Console

    from orepa_compiler.cli.shown.summary import write_json
    from orepa_compiler.export.latency import bench
    from orepa_compiler.progress import announced

    with announced("timing") as step:
        found = bench(
            model,
            against,
            engine=engine,
            against_engine=against_engine,
            batch=batch,
            rounds=rounds,
            step=step,
        )
    console = Console()
    console.print(found) if console.is_terminal else typer.echo(str(found))
    if output:
        write_json(output, found.to_dict())
    if not found:
        return ExitCode.NOT_VERIFIED
    return ExitCode.MISMATCH if gate and found.problems else ExitCode.PASS
