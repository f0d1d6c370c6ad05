"""The command line: orepa plan, orepa export and orepa verify; orepa-export stands alone too."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orepa_compiler import __version__
from orepa_compiler.cli.arguments import (
    EXIT_CODES,
    Checkpoint,
    Debug,
    ExitCode,
    Model,
    NotVerified,
    Pickle,
    Report,
    Shapes,
    check_folder,
    load_side,
    load_source,
    named_block,
    random_inputs,
    shape,
)
from orepa_compiler.cli.stages import ExportRequest, export_steps
from orepa_compiler.cli.summary import complaints, report_of, show_steps, verdict, write_json
from orepa_compiler.compiler import plan
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.flavors import Flavor
from orepa_compiler.export.onnx import Precision
from orepa_compiler.export.progress import announced
from orepa_compiler.model_source import FORMS
from orepa_compiler.verification import verify

# typer exports this one's subclass only, and every wrong command line raises this one.
_UsageError: Any = typer.BadParameter.__mro__[1]


def _typer(help: str) -> typer.Typer:
    return typer.Typer(
        help=help,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


app = _typer("Rewrites a conv net into OREPA training form, collapses it, proves the two equal.")
export_app = _typer("")


@app.callback(invoke_without_command=True)
def _orepa(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if show_version:
        typer.echo(f"orepa-compiler {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("plan", epilog=EXIT_CODES)
def plan_command(
    model: Model,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(metavar="CxHxW", help="Needed for MACs; once for each input."),
    ] = None,
    block: Annotated[str, typer.Option(help="The block every conv becomes, or auto.")] = "auto",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only convs on these paths; '!layer4.*' excludes."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    debug: Debug = False,
) -> int:
    """What expand would do to a model, and what it would leave alone and why. Changes nothing.

    Examples:

      orepa plan torchvision:resnet50
      orepa plan timm:mobilenetv3_small_100 --input-shape 3x224x224
      orepa plan nets.py:build --block OREPA --where 'layer1.*' --json
    """
    inputs = random_inputs([shape(text) for text in input_shape], 1) if input_shape else None
    net = load_source(model, None, inputs=inputs)
    with announced("planning"):
        found = plan(net, block=named_block(block), where=where or None, inputs=inputs)
    if json:
        typer.echo(found.to_json())
    else:
        _show(found)
    return ExitCode.PASS


@app.command("export", epilog=EXIT_CODES)
@export_app.command(epilog=EXIT_CODES)
def export_command(
    model: Model,
    checkpoint: Checkpoint = None,
    onnx: Annotated[Path | None, typer.Option(metavar="OUT.onnx")] = None,
    trt: Annotated[
        Path | None,
        typer.Option(metavar="OUT.engine", help="Without --onnx, OUT.onnx is written beside it."),
    ] = None,
    input_shape: Shapes = ["3x224x224"],  # noqa: B006
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Of the inputs compared: 2, or 1 with --static-batch."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of the artifacts.")] = "fp32",
    static_batch: Annotated[
        bool, typer.Option("--static-batch", help="Fix the batch size in the artifacts.")
    ] = False,
    simplify: Annotated[
        bool, typer.Option("--simplify", help="Run onnxsim over the ONNX.")
    ] = False,
    trt_flavor: Annotated[Flavor, typer.Option(help="Which TensorRT.")] = "auto",
    compute_capability: Annotated[
        str | None, typer.Option(metavar="8.9", help="Build for this GPU; none is needed here.")
    ] = None,
    allow_pickle: Pickle = False,
    report: Report = None,
    debug: Debug = False,
) -> int:
    """From a trained model to ONNX and TensorRT, each step checked against the one before it.

    Examples:

      orepa-export torchvision:resnet50 --checkpoint best.pth --onnx r50.onnx
      orepa-export nets.py:build --onnx net.onnx --precision fp16 --report net.json
      orepa-export timm:resnet18 --trt r18.engine --compute-capability 8.9
      orepa-export nets.py:pair --onnx pair.onnx --input-shape 3x64x64 --input-shape 8

    An engine that no GPU has run is no pass of the engine: "device numerics: not run" says so.
    """
    target = onnx or (trt and trt.with_suffix(".onnx"))
    if target is None:
        raise ReparamError("nothing to write: give --onnx OUT.onnx or --trt OUT.engine")
    for path in (target, trt, report):
        check_folder(path)
    request = ExportRequest(
        model=model,
        checkpoint=checkpoint,
        onnx=target,
        engine=trt,
        shapes=tuple(shape(text) for text in input_shape),
        batch=batch,
        precision=precision,
        static_batch=static_batch,
        simplify=simplify,
        flavor=trt_flavor,
        compute_capability=compute_capability,
        allow_pickle=allow_pickle,
    )
    steps = export_steps(request)
    show_steps(steps)
    if report:
        write_json(report, report_of(request, steps))
    for step in steps:
        if debug and step.cause:
            traceback.print_exception(step.cause)
    for line in complaints(steps):
        print(line, file=sys.stderr)
    return verdict(steps)


@app.command("verify", epilog=EXIT_CODES)
def verify_command(
    reference: Annotated[str, typer.Argument(metavar="A", help=f"FILE.onnx, or {FORMS}")],
    candidate: Annotated[str, typer.Argument(metavar="B", help="The same, compared against A.")],
    checkpoint_a: Checkpoint = None,
    checkpoint_b: Checkpoint = None,
    input_shape: Shapes = ["3x224x224"],  # noqa: B006
    batch: Annotated[int, typer.Option(min=1, help="Of the inputs compared.")] = 2,
    precision: Annotated[
        Precision | None, typer.Option(help="What B was exported in, and must hold.")
    ] = None,
    allow_pickle: Pickle = False,
    report: Report = None,
    debug: Debug = False,
) -> int:
    """Whether two models give the same outputs, with a tolerance derived from A's own precision.

    Examples:

      orepa verify timm:resnet18 r18.onnx --checkpoint-a trained.safetensors
      orepa verify nets.py:trained nets.py:collapsed --input-shape 3x64x64
      orepa verify fp32.onnx fp16.onnx --precision fp16 --report verified.json
    """
    check_folder(report)
    inputs = random_inputs([shape(text) for text in input_shape], batch)
    left = load_side(reference, checkpoint_a, inputs=inputs, allow_pickle=allow_pickle)
    right = load_side(candidate, checkpoint_b, inputs=inputs, allow_pickle=allow_pickle)
    with announced("comparing"):
        try:
            found = verify(left, right, inputs, precision=precision)
        except ReparamError as error:
            raise NotVerified(str(error)) from error
    _show(found)
    if report:
        write_json(report, found.to_dict())
    return ExitCode.PASS if found else ExitCode.MISMATCH


def _show(found: object) -> None:
    console = Console()
    # A pipe has no width; the text of a plan or a report has one of its own.
    console.print(found) if console.is_terminal else typer.echo(str(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """`orepa`: runs a command and returns its exit code."""
    return _run(app, "orepa", sys.argv[1:] if arguments is None else arguments)


def export_main(arguments: Sequence[str] | None = None) -> int:
    """`orepa-export`: runs it and returns its exit code."""
    return _run(export_app, "orepa-export", sys.argv[1:] if arguments is None else arguments)


def _run(commands: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    def stop(message: str, code: ExitCode) -> int:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        return code

    command = typer.main.get_command(commands)
    try:
        return int(command.main(list(arguments), prog_name=name, standalone_mode=False) or 0)
    except _UsageError as error:
        message = error.format_message().rstrip(".")
        return stop(f"{message}; see {name} --help", ExitCode.USAGE)
    except NotVerified as error:
        return stop(str(error), ExitCode.NOT_VERIFIED)
    except ReparamError as error:
        return stop(str(error), ExitCode.USAGE)
    except Exception as error:
        reason = f"stopped by {type(error).__name__}: {error}; --debug shows where"
        return stop(reason, ExitCode.NOT_VERIFIED)
