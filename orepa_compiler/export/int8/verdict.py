"""Judges an int8 file by the noise that int8 must have with its ranges.

noise     = max |dithered - truth| / max |truth|, over float32 files in which each rounding to int8
            is replaced by random noise of its size (see dithering)
tolerance = factor * noise, and how often another entry comes first is held to the same factor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from orepa_compiler.compiler import collapse
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.int8.dithering import rounding_steps, with_int8_noise
from orepa_compiler.export.int8.ranges import LostChannels, advice, is_named
from orepa_compiler.export.onnx.inspection import input_names, torch_module
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.export.onnx.writing import export_onnx
from orepa_compiler.export.run.runners import OnnxRunner
from orepa_compiler.export.run.tapping import tapped
from orepa_compiler.verification import NOISE_FACTOR, Report, judge, take_samples
from orepa_compiler.verification.evaluation import Batch, batches_of
from orepa_compiler.verification.nesting import tensors_in


def verify_int8(
    reference: Any,
    candidate: Any,
    inputs: Any,
    *,
    truth: nn.Module | None = None,
    factor: float = NOISE_FACTOR,
) -> Report:
    """Judges an int8 ONNX file beside the model, or the float32 file, that it was made of.

    reference: a torch model in any form, or a runner of the float32 file. candidate: a runner of
    the int8 file. inputs: as in verify; those of the kind that the ranges were taken on. Where it
    fails, a note names the layers of whose input channels int8 keeps nothing.
    Raises ReparamError for other sides, where the int8 file is not of that model, and what verify
    raises.
    """
    if not isinstance(candidate, OnnxRunner):
        raise ReparamError(
            f"precision='int8': the candidate is a {type(candidate).__name__}; its ranges are read "
            "from the ONNX file, so give that (of an engine, the one that it was built from)"
        )
    batches = batches_of(inputs)
    samples = take_samples(reference, batches, truth=truth, precision=torch.float32)
    with TemporaryDirectory() as folder:
        float32 = _float32_file(reference, truth, candidate, batches, Path(folder))
        samples = with_int8_noise(samples, float32, candidate.path, Path(folder))
        report = judge(samples, candidate, factor=factor)
        if report:
            return report
        said = advice(lost_in_file(float32, candidate.path, batches))
    return replace(report, notes=(*report.notes, said)) if said else report


def _float32_file(
    reference: Any,
    truth: nn.Module | None,
    candidate: OnnxRunner,
    batches: list[Batch],
    folder: Path,
) -> Path:
    """Finds or makes the float32 file of the same net: the reference's, or made of it."""
    if isinstance(reference, OnnxRunner):
        return reference.path
    source = truth if truth is not None else reference
    if not isinstance(source, nn.Module):
        raise ReparamError(
            f"precision='int8': the reference is a {type(source).__name__}; give the torch model, "
            "or its float32 ONNX file, whose nodes tell where int8 rounds"
        )
    shapes = [spec.shape for spec in candidate.inputs]
    is_dynamic = isinstance(shapes[0][0], str) if shapes else True
    has_sizes = any(isinstance(axis, str) for shape in shapes for axis in shape[1:])
    was_training = source.training
    try:
        deploy = collapse(source.eval(), inputs=batches[0])
    finally:
        source.train(was_training)
    path = folder / "fp32.onnx"
    return export_onnx(deploy, batches[0], path, dynamic_batch=is_dynamic, dynamic_size=has_sizes)


def lost_in_file(float32: Path, int8: Path, batches: Sequence[Batch]) -> list[LostChannels]:
    """Finds the layers of which the int8 file rounds most input channels to 0, on these batches.

    By the steps in the file: a channel that stays below half a step is 0.
    """
    model = load_graph(float32)
    steps = rounding_steps(int8)
    read = [
        (node, value.name or "")
        for node in model.graph.all_nodes()
        for value in node.inputs[:1]
        if (node.name or "", 0) in steps and value is not None and value.const_value is None
    ]
    peaks: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, value in tapped(float32, {name for _, name in read}, tensors_in(batch)).items():
            axis = 1 if value.ndim > 2 else -1
            peak = value.abs().movedim(axis, 0).flatten(1).amax(1).double().numpy()
            peaks[name] = np.maximum(peaks.get(name, 0.0), peak)
    sizes = {name: t.size for name, t in model.graph.initializers.tensor_items()}
    total = sum(sizes.values()) or 1
    found = []
    for node, name in read:
        alive = peaks[name][peaks[name] > 0]
        if len(alive):
            lost = int((alive < float(steps[node.name or "", 0][0].max()) / 2).sum())
            spread = float(alive.max() / np.median(alive))
            share = sum(sizes.get(part, 0) for part in input_names(node)) / total
            path = torch_module(node) or node.name or ""
            found.append(LostChannels(path, lost, len(alive), spread, share))
    return [layer for layer in found if is_named(layer)]
