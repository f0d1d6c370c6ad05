"""orepa verify: whether two models, or the files of an export, give the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orepa_compiler.choices import Precision
from orepa_compiler.cli.given.options import (
    SIDES,
    Checkpoint,
    Debug,
    Inputs,
    Json,
    Junit,
    Pickle,
    Quiet,
    Report,
    Shapes,
    Which,
    check_folder,
    check_kept,
    report_files,
    shape,
)
from orepa_compiler.errors import ReparamError


def verify_command(
    context: typer.Context,
    reference: Annotated[
        str, typer.Argument(metavar="A", help=f"{SIDES}. Or alone: FILE.manifest.json")
    ],
    candidate: Annotated[
        str | None, typer.Argument(metavar="B", help="The same kinds; compared with A.")
    ] = None,
    checkpoint_a: Checkpoint = None,
    checkpoint_b: Checkpoint = None,
    inputs: Inputs = None,
    input_shape: Shapes = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of the inputs.")] = 2,
    stress: Annotated[
        bool, typer.Option(help="Compare on random, constant, large and small inputs too.")
    ] = True,
    precision: Annotated[
        Precision | None, typer.Option(help="The precision in which B was exported.")
    ] = None,
    allow_pickle: Pickle = False,
    json: Json = None,
    junit: Junit = None,
    report: Report = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="If it fails, draw the error over the feature map."),
    ] = None,
    weights: Which = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Check that two models give the same outputs, within a tolerance derived from A's precision.

    Examples:

      orepa verify timm:resnet18 r18.onnx --checkpoint-a trained.safetensors
      orepa verify nets.py:trained nets.py:trained@collapsed --inputs images.npy
      orepa verify fp32.onnx simplified.onnx
      orepa verify fp32.onnx fp16.onnx --precision fp16 --json verified.json
      orepa verify nets.py:trained r18.onnx@cuda --junit verified.xml
      orepa verify r18.onnx.manifest.json

    Given a manifest that orepa-export wrote, it repeats the checks: hashes,
    gates (counts of convs, norms and sums) and outputs; on a machine with a GPU
    also what was not run before.
    """
    page, json = report_files(report, json)
    command = str(context.find_root().obj or "")
    for path in (json, junit, picture, page):
        check_folder(path)
    written = {"json": json, "junit": junit, "picture": picture, "report": page}
    check_kept(written, reference, candidate, checkpoint_a, checkpoint_b, inputs)
    shapes = [shape(text) for text in input_shape or ()]
    # Only now torch and what the rest needs: a mistake above is told at once.
    from orepa_compiler.cli.run.comparing import compare_sides
    from orepa_compiler.cli.run.rechecking import recheck_steps
    from orepa_compiler.cli.shown.pages import not_run_page, page_of_recheck
    from orepa_compiler.cli.shown.summary import finish, recheck_report, write_json
    from orepa_compiler.export.manifest import is_manifest
    from orepa_compiler.progress import announced
    from orepa_compiler.report import write_page

    if is_manifest(reference):
        if candidate is not None:
            raise ReparamError(f"{reference}: a manifest is checked alone; leave out {candidate}")
        with announced(f"checking {reference}"):
            steps = recheck_steps(Path(reference))
        if json:
            write_json(json, recheck_report(steps))
        if page:
            write_page(page_of_recheck(Path(reference), steps, command), page)
        return finish("orepa-verify", steps, junit, debug)
    if candidate is None:
        raise ReparamError(
            f"{reference}: give a second side to compare it with, or a FILE.manifest.json alone"
        )
    with not_run_page(page, reference, candidate):
        return compare_sides(
            (reference, checkpoint_a),
            (candidate, checkpoint_b),
            data=inputs,
            shapes=shapes,
            batch=batch,
            stress=stress,
            precision=precision,
            allow_pickle=allow_pickle,
            weights=weights,
            json=json,
            junit=junit,
            picture=picture,
            page=page,
            command=command,
        )
