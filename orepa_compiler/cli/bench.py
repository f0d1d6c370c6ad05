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
    check_writable,
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
        Path | None, typer.Option(metavar="STOCK.onnx", help="The file to compare with.")
    ] = None,
    against_engine: Annotated[
        Path | None, typer.Option(metavar="STOCK.engine", help="The TensorRT engine of that file.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per call.")] = 1,
    rounds: Annotated[int, typer.Option(min=6, help="How often both files are timed.")] = ROUNDS,
    gate: Annotated[
        bool,
        typer.Option("--gate", help="Exit with 1 if node counts differ or MODEL is slower."),
    ] = False,
    output: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Compare the latency of a collapsed model and the stock one, timed alternately in one run.

    On onnxruntime (CPU and CUDA), OpenVINO and TensorRT, if available; else the row says why not.

    Examples:

      orepa bench collapsed.onnx --against stock.onnx
      orepa bench a.onnx a.engine --against b.onnx --against-engine b.engine
      orepa bench nets/a.onnx --against nets/b.onnx --batch 8 --json latency.json

    The two are within noise if the 95 % interval of the ratio of their times,
    round by round, contains 1. A collapsed net has as many nodes as the stock
    one: with --gate, another number, or a backend on which MODEL is slower, is
    a mismatch.
    """
    if against is None:
        raise ReparamError("nothing to compare with: give --against STOCK.onnx")
    check_writable(json=output)
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
