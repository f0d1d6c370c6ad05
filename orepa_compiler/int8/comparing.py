"""Compares a model that rounds to int8 with a file: integers first, then outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from orepa_compiler.compiler import collapse
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.int8.integers import check_integers
from orepa_compiler.export.int8.trained import trained_layers
from orepa_compiler.export.onnx.precision import kept_modules, lies_in
from orepa_compiler.export.run.openvino import OpenVINORunner
from orepa_compiler.export.run.runners import OnnxRunner
from orepa_compiler.quantization.flips import with_flips
from orepa_compiler.quantization.layers import rounded_layers, with_float_maps
from orepa_compiler.verification import Report, Row, judge, take_samples
from orepa_compiler.verification.modes import evaluation_mode


def verify_rounded(
    reference: nn.Module,
    candidate: Callable[..., Any],
    inputs: Any,
    *,
    factor: float,
    stress: bool,
) -> Report:
    """Judges what was made of a model that rounds.

    Of a runner of an ONNX file, its integers, steps and ranges must be those of the model, all of
    them; but those of layers that the file says it keeps in float32.
    The tolerance of the outputs comes from values that fall on another step in float32.
    """
    kept: list[str] = []
    file = candidate if isinstance(candidate, (OnnxRunner, OpenVINORunner)) else None
    if file is not None:
        deploy = collapse(reference)
        named = file.properties.get("orepa.keep_fp32", "").split()
        places = kept_modules(deploy, named)
        kept = [layer for layer in rounded_layers(reference) if lies_in(layer, places)]
    with evaluation_mode(reference, candidate):
        written = with_float_maps(reference, kept)
        samples = take_samples(written, inputs, stress=stress)
        report = judge(with_flips(samples, written), candidate, factor=factor)
    if file is None or file.path.suffix != ".onnx":  # OpenVINO's own file has them otherwise
        return report
    row, note = _compared_integers(deploy, file.path, kept)
    rows = report.rows if row is None else (row, *report.rows)
    return replace(report, rows=rows, notes=(*((note,) if note else ()), *report.notes))


def _compared_integers(
    deploy: nn.Module, path: Path, kept: Sequence[str]
) -> tuple[Row | None, str]:
    """Compares the integers: a row that fails, or None and what there is to say."""
    layers = trained_layers(deploy, keep=kept)
    try:
        count = check_integers(path, layers)
    except ReparamError as error:
        return Row("int8 kernels", 0, (), "int8", reason=str(error)), ""
    return None, f"all {count:,} integers of {len(layers)} kernels in {path.name} are the model's"
