"""orepa-export: from a trained model to ONNX and TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orepa_compiler.choices import ENGINES, OPENVINO, Precision
from orepa_compiler.cli.given.engine_options import (
    Calibration,
    ComputeCapability,
    Int8Preset,
    KeepFp32,
    MaxShapes,
    MinShapes,
    OptShapes,
    Tf32,
    TimingCache,
    TrtFlavor,
    Workspace,
    check_engine_options,
    check_preset_option,
    profile,
)
from orepa_compiler.cli.given.interface_options import (
    InputNames,
    OutputNames,
    check_names,
    check_sizes,
    split_names,
)
from orepa_compiler.cli.given.options import (
    Checkpoint,
    Classes,
    Crop,
    Debug,
    Expanded,
    Inputs,
    Json,
    Junit,
    Mean,
    Model,
    Pickle,
    Pretrained,
    Quiet,
    Report,
    Resize,
    Shapes,
    Std,
    Which,
    check_ending,
    check_kept,
    check_there,
    check_writable,
    has_no_effect,
    report_files,
)
from orepa_compiler.errors import ReparamError


def export_command(
    context: typer.Context,
    model: Model,
    checkpoint: Checkpoint = None,
    weights: Which = None,
    pretrained: Pretrained = False,
    num_classes: Classes = None,
    expanded: Expanded = None,
    onnx: Annotated[
        Path | None, typer.Option(metavar="OUT.onnx", help="Write the collapsed model here.")
    ] = None,
    trt: Annotated[
        Path | None,
        typer.Option(metavar="OUT.engine", help="Build a TensorRT engine, and its ONNX beside it."),
    ] = None,
    openvino: Annotated[
        Path | None, typer.Option(metavar="OUT.xml", help="Write it for OpenVINO too (CPUs).")
    ] = None,
    input_shape: Shapes = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Batch size of the comparisons: 2, or 1 with --static-batch."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Precision of the files.")] = "fp32",
    static_batch: Annotated[
        bool, typer.Option("--static-batch", help="Fix the batch size in the files.")
    ] = False,
    dynamic_size: Annotated[
        bool,
        typer.Option(
            "--dynamic-size",
            help="Make height and width dynamic too; checked at a second size.",
        ),
    ] = False,
    input_names: InputNames = None,
    output_names: OutputNames = None,
    simplify: Annotated[bool, typer.Option("--simplify", help="Run onnxsim on the ONNX.")] = False,
    opset: Annotated[
        int | None, typer.Option(help="ONNX operator set: 18 or newer; 20 by default.")
    ] = None,
    keep_fp32: KeepFp32 = None,
    calibration: Calibration = None,
    int8_preset: Int8Preset = None,
    trt_flavor: TrtFlavor = "auto",
    compute_capability: ComputeCapability = None,
    min_shapes: MinShapes = None,
    opt_shapes: OptShapes = None,
    max_shapes: MaxShapes = None,
    workspace: Workspace = None,
    tf32: Tf32 = False,
    timing_cache: TimingCache = None,
    inputs: Inputs = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Your function, called with each form of the model; returns a number or a dict.",
        ),
    ] = None,
    allow_pickle: Pickle = False,
    json: Json = None,
    junit: Junit = None,
    report: Report = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Export a trained model to ONNX and TensorRT, checking each step against the one before.

    Examples:

      orepa-export timm:resnet18 --pretrained --onnx r18.onnx
      orepa-export nets.py:build --checkpoint a.pth --weights ema --onnx a.onnx
      orepa-export nets.py:build --onnx net.onnx --precision fp16 --json net.json
      orepa-export timm:resnet18 --trt r18.engine --compute-capability 8.9
      orepa-export nets.py:f --trt a.engine --precision int8 --calibration dir/
      orepa-export timm:resnet18 --onnx r18.onnx --dynamic-size
      orepa-export nets.py:g --onnx a.onnx --input-shape 3x64x64 --input-shape 8

    An engine that was built but not run on a GPU does not count as checked:
    its row says "device numerics: not run".
    With OUT.onnx.manifest.json, written beside the ONNX, orepa verify repeats
    the checks elsewhere.
    """
    other = trt or openvino
    target = onnx or (other and other.with_suffix(".onnx"))
    if target is None:
        raise ReparamError(
            "nothing to write: give --onnx OUT.onnx, --trt OUT.engine or --openvino OUT.xml"
        )
    shapes = profile(min_shapes, opt_shapes, max_shapes)
    written = {
        "onnx": target,
        "trt": trt,
        "openvino": openvino,
        "json": json,
        "junit": junit,
        "report": report,
    }
    check_writable(**written, timing_cache=timing_cache)
    check_kept(written, checkpoint, model, inputs, calibration, evaluate)
    check_ending("--onnx", onnx, ".onnx")
    check_ending("--trt", trt, *ENGINES)
    check_ending("--openvino", openvino, OPENVINO)
    page, json = report_files(report, json)
    if openvino is not None and precision == "bf16":
        raise ReparamError("--openvino: takes fp32, fp16 and int8; export bf16 without it")
    oldest = 22 if precision == "bf16" else 18
    if opset is not None and not oldest <= opset:
        raise ReparamError(f"--opset {opset}: {precision} needs {oldest} or newer")
    check_there(checkpoint=checkpoint)
    check_engine_options(
        trt is not None,
        shapes=shapes,
        workspace=workspace,
        tf32=tf32,
        timing_cache=timing_cache,
        compute_capability=compute_capability,
        flavor=trt_flavor,
    )
    names = split_names("--input-names", input_names), split_names("--output-names", output_names)
    check_names(*names, input_shape or ())
    check_sizes(dynamic_size, trt is not None, shapes, input_shape or ())
    has_no_effect("--weights", weights is not None and not checkpoint, "there is no --checkpoint")
    has_no_effect("--expanded", expanded is not None and not checkpoint, "there is no --checkpoint")
    has_no_effect("--pretrained", pretrained and checkpoint is not None, "--checkpoint has them")
    has_no_effect("--allow-pickle", allow_pickle and not checkpoint, "there is no --checkpoint")
    has_no_effect(
        "--calibration", calibration is not None and precision == "fp32", "fp32 needs no ranges"
    )
    check_preset_option(int8_preset, precision=precision, has_engine=trt is not None)
    has_no_effect("--keep-fp32", bool(keep_fp32) and precision == "fp32", "all of it is float32")
    # Only now torch and what the rest needs: a mistake above is told at once.
    from orepa_compiler.cli.run.exporting import run_export

    return run_export(
        {
            "model": model,
            "checkpoint": checkpoint,
            "weights": weights,
            "pretrained": pretrained,
            "num_classes": num_classes,
            "expanded": expanded,
            "onnx": target,
            "engine": trt,
            "openvino": openvino,
            "shapes": tuple(input_shape or ()),
            "batch": batch,
            "precision": precision,
            "static_batch": static_batch,
            "dynamic_size": dynamic_size,
            "input_names": names[0],
            "output_names": names[1],
            "simplify": simplify,
            "opset": opset,
            "flavor": trt_flavor,
            "compute_capability": compute_capability,
            "allow_pickle": allow_pickle,
            "data": inputs,
            "images": {"resize": resize, "crop": crop, "mean": mean, "std": std},
            "evaluate": evaluate,
            "keep_fp32": tuple(keep_fp32 or ()),
            "calibration": calibration,
            "int8_preset": int8_preset,
            "profile": shapes,
            "workspace_gb": workspace,
            "tf32": tf32,
            "timing_cache": timing_cache,
            "report": page,
            "command": str(context.find_root().obj or ""),
        },
        json=json,
        junit=junit,
        debug=debug,
    )
