"""orepa-export: from a trained model to ONNX and TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orepa_compiler.cli.arguments import (
    Checkpoint,
    Debug,
    Inputs,
    Json,
    Junit,
    Model,
    Pickle,
    Report,
    Shapes,
    check_folder,
    report_files,
    shape,
)
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
from orepa_compiler.cli.export_request import ExportRequest
from orepa_compiler.cli.finishing import finish
from orepa_compiler.cli.pages import page_of_export
from orepa_compiler.cli.stages import export_steps
from orepa_compiler.cli.summary import (
    report_of,
    write_json,
)
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.precision import Precision
from orepa_compiler.report import write_page


def export_command(
    context: typer.Context,
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
        command=str(context.find_root().obj or ""),
    )
    steps = export_steps(request)
    if json:
        write_json(json, report_of(request, steps))
    if page:
        write_page(page_of_export(request, steps), page)
    return finish("orepa-export", steps, junit, debug)
