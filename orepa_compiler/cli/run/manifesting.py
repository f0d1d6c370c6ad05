"""Writes the manifest of an export: which files there are, what was checked, and the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from orepa_compiler.cli.given.export_request import ExportRequest
from orepa_compiler.cli.run.steps import ExportStep, finite
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.manifest import Check, Role, make_manifest, manifest_path, write_manifest
from orepa_compiler.export.onnx.external_data import external_files
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.files.atomic import staged
from orepa_compiler.verification import Samples
from orepa_compiler.verification.sample_file import save_samples


def manifest_step(
    request: ExportRequest, steps: Sequence[ExportStep], samples: Callable[[], Samples]
) -> ExportStep:
    """Writes the manifest beside the ONNX file. samples: gives what the collapsed model gives."""
    path, note = manifest_path(request.onnx), ""
    files = list(_files(request, {step.name for step in steps if step.verdict == "done"}))
    try:
        files.append(("samples", _write_samples(request.onnx, samples())))
    except ReparamError as error:
        note = f"without samples, so it cannot be checked again elsewhere: {error}"
    checks = [Check(s.name, s.verdict, finite(s.error), s.note) for s in steps]
    write_manifest(path, make_manifest(path, files, options=asdict(request), checks=checks))
    return ExportStep("write manifest", "done", path, note=note)


def _files(request: ExportRequest, done: set[str]) -> Iterator[tuple[Role, Path]]:
    """The files of an export, as far as the steps that write them are done."""
    yield "onnx", request.onnx
    for name in external_files(load_graph(request.onnx)):
        yield "weights", request.onnx.resolve().parent / name
    if request.checkpoint:
        yield "checkpoint", request.checkpoint
    if request.engine is not None and "build engine" in done:
        yield "engine", request.engine
    if request.openvino is not None and "write openvino" in done:
        yield "openvino", request.openvino
        yield "weights", request.openvino.with_suffix(".bin")


def _write_samples(onnx: Path, samples: Samples) -> Path:
    path = onnx.with_name(f"{onnx.name}.samples.safetensors")
    with staged(path) as draft:
        save_samples(samples, draft)
    return path
