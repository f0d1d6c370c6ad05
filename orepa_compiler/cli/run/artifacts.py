"""Lists the files of an export that its manifest names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orepa_compiler.cli.given.export_request import ExportRequest
from orepa_compiler.cli.run.steps import Step
from orepa_compiler.export.manifest import Role
from orepa_compiler.export.onnx.external_data import external_files
from orepa_compiler.export.onnx.inspection import load_graph


def artifact_files(request: ExportRequest, steps: Sequence[Step]) -> list[tuple[Role, Path]]:
    """Lists the files that were written, and the checkpoint, each with its role."""
    done = {step.name for step in steps if step.verdict == "done"}
    files: list[tuple[Role, Path]] = [("onnx", request.onnx)]
    folder = request.onnx.resolve().parent
    files += [("weights", folder / name) for name in external_files(load_graph(request.onnx))]
    if request.checkpoint:
        files.append(("checkpoint", request.checkpoint))
    if request.engine is not None and "build engine" in done:
        files.append(("engine", request.engine))
    if request.openvino is not None and "write openvino" in done:
        files.append(("openvino", request.openvino))
        files.append(("weights", request.openvino.with_suffix(".bin")))
    return files
