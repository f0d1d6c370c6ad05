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
    Inputs,
    Json,
    Junit,
    Model,
    NotVerified,
    Pickle,
    Report,
    Shapes,
    check_folder,
    load_source,
    named_block,
    random_inputs,
    report_files,
    shape,
)
from orepa_compiler.cli.bench import bench_command
from orepa_compiler.cli.comparing import compare_sides
from orepa_compiler.cli.engine_options import (
    Calibration,
    ComputeCapability,
    KeepFp32,
    MaxShapes,
    MinShapes,
    OptShapes,
    Tf32,
    TimingCache,
    TrtFlavor,
    Workspace,
    profile,
)
from orepa_compiler.cli.junit import write_junit
from orepa_compiler.cli.pages import not_run_page, page_of_export, page_of_recheck
from orepa_compiler.cli.rechecking import recheck_steps
from orepa_compiler.cli.sides import SIDES
from orepa_compiler.cli.stages import ExportRequest, export_steps
from orepa_compiler.cli.steps import Step
from orepa_compiler.cli.summary import (
    cases,
    complaints,
    recheck_report,
    report_of,
    show_steps,
    verdict,
    write_json,
)
from orepa_compiler.compiler import plan
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.precision import Precision
from orepa_compiler.export.progress import announced
from orepa_compiler.manifest import is_manifest
from orepa_compiler.report import write_page

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
app.command("bench", epilog=EXIT_CODES)(bench_command)


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
    keep_fp32: KeepFp32 = None,
    calibration: Calibration = None,
    trt_flavor: TrtFlavor = "auto",
    compute_capability: ComputeCapability = None,
    min_shapes: MinShapes = None,
    opt_shapes: OptShapes = None,
    max_shapes: MaxShapes = None,
    workspace: Workspace = None,
    tf32: Tf32 = False,
    timing_cache: TimingCache = None,
    inputs: Inputs = None,
    allow_pickle: Pickle = False,
    json: Json = None,
    junit: Junit = None,
    report: Report = None,
    debug: Debug = False,
) -> int:
    """From a trained model to ONNX and TensorRT, each step checked against the one before it.

    Examples:

      orepa-export torchvision:resnet50 --checkpoint best.pth --onnx r50.onnx
      orepa-export nets.py:build --onnx net.onnx --precision fp16 --json net.json
      orepa-export timm:resnet18 --trt r18.engine --compute-capability 8.9
      orepa-export nets.py:build --trt net.engine --precision int8 --calibration images/
      orepa-export nets.py:pair --onnx pair.onnx --input-shape 3x64x64 --input-shape 8

    An engine that no GPU has run is no pass of the engine: "device numerics: not run" says so.
    OUT.onnx.manifest.json, written beside the ONNX, lets orepa verify check it all again elsewhere.
    """
    target = onnx or (trt and trt.with_suffix(".onnx"))
    if target is None:
        raise ReparamError("nothing to write: give --onnx OUT.onnx or --trt OUT.engine")
    page, json = report_files(report, json)
    for path in (target, trt, json, junit, timing_cache, page):
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
        data=inputs,
        keep_fp32=tuple(keep_fp32 or ()),
        calibration=calibration,
        profile=profile(min_shapes, opt_shapes, max_shapes),
        workspace_gb=workspace,
        tf32=tf32,
        timing_cache=timing_cache,
        report=page,
    )
    steps = export_steps(request)
    if json:
        write_json(json, report_of(request, steps))
    if page:
        write_page(page_of_export(request, steps), page)
    return _finish("orepa-export", steps, junit, debug)


@app.command("verify", epilog=EXIT_CODES)
def verify_command(
    reference: Annotated[
        str, typer.Argument(metavar="A", help=f"{SIDES}. Or alone: FILE.manifest.json")
    ],
    candidate: Annotated[
        str | None, typer.Argument(metavar="B", help="The same, compared against A.")
    ] = None,
    checkpoint_a: Checkpoint = None,
    checkpoint_b: Checkpoint = None,
    inputs: Inputs = None,
    input_shape: Shapes = ["3x224x224"],  # noqa: B006
    batch: Annotated[int, typer.Option(min=1, help="Of the inputs compared.")] = 2,
    stress: Annotated[
        bool, typer.Option(help="Compare on random, constant, large and small inputs too.")
    ] = True,
    precision: Annotated[
        Precision | None, typer.Option(help="What B was exported in, and must hold.")
    ] = None,
    allow_pickle: Pickle = False,
    json: Json = None,
    junit: Junit = None,
    report: Report = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Where it fails: the error over the feature map."),
    ] = None,
    debug: Debug = False,
) -> int:
    """Whether two models give the same outputs, with a tolerance derived from A's own precision.

    Examples:

      orepa verify timm:resnet18 r18.onnx --checkpoint-a trained.safetensors
      orepa verify nets.py:trained nets.py:trained@collapsed --inputs images.npy
      orepa verify fp32.onnx fp16.onnx --precision fp16 --json verified.json
      orepa verify nets.py:trained r18.onnx@cuda --junit verified.xml
      orepa verify r18.onnx.manifest.json

    A manifest, which orepa-export writes, is checked again: hashes, gates and numbers, and on a
    machine with a GPU what was not run before.
    """
    page, json = report_files(report, json)
    for path in (json, junit, picture, page):
        check_folder(path)
    if is_manifest(reference):
        if candidate is not None:
            raise ReparamError(f"{reference}: a manifest is checked alone; leave out {candidate}")
        with announced(f"checking {reference}"):
            steps = recheck_steps(Path(reference))
        if json:
            write_json(json, recheck_report(steps))
        if page:
            write_page(page_of_recheck(Path(reference), steps), page)
        return _finish("orepa-verify", steps, junit, debug)
    if candidate is None:
        raise ReparamError(
            f"{reference}: give B, what to compare it with, or one FILE.manifest.json"
        )
    with not_run_page(page, reference, candidate):
        return compare_sides(
            (reference, checkpoint_a),
            (candidate, checkpoint_b),
            data=inputs,
            shapes=[shape(text) for text in input_shape],
            batch=batch,
            stress=stress,
            precision=precision,
            allow_pickle=allow_pickle,
            json=json,
            junit=junit,
            picture=picture,
            page=page,
        )


def _finish(suite: str, steps: Sequence[Step], junit: Path | None, debug: bool) -> int:
    show_steps(steps)
    if junit:
        write_junit(junit, suite, cases(steps))
    for step in steps:
        if debug and step.cause:
            traceback.print_exception(step.cause)
    for line in complaints(steps):
        print(line, file=sys.stderr)
    return verdict(steps)


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
