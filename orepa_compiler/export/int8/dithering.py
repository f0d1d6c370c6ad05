"""Measures the noise that int8 must have: each rounding replaced by random noise.

Rounding to steps of size s moves a value by up to s/2 either way. So every tensor that the int8
file quantizes gets, in a copy of the float32 file, noise drawn evenly from [-s/2, s/2]. What comes
out is as far from the truth as int8 with these ranges has to be, and an int8 file that is much
farther is wrong.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.int8.quantization import restoring_node
from orepa_compiler.export.onnx.external_data import external_files, load_external
from orepa_compiler.export.onnx.inspection import ints_of
from orepa_compiler.export.onnx.reading import load_graph, values_of
from orepa_compiler.export.onnx.rewriting import save_model
from orepa_compiler.export.run.runners import OnnxRunner
from orepa_compiler.verification import Samples
from orepa_compiler.verification.evaluation import Side, evaluate

if TYPE_CHECKING:
    import onnx_ir as ir

# How often the noise is drawn.
DRAWS = 2

# By node and input, the step of the rounding and, of several steps, along which axis.
Steps = dict[tuple[str, int], tuple[np.ndarray, int]]

# What messages call it.
NOISE_NAME = "int8 with these ranges"


def with_int8_noise(samples: Samples, float32: Path, int8: Path, folder: Path) -> Samples:
    """Gives the samples of a model the noise of int8 in the place of its own precision's.

    float32, int8: the ONNX files of the model. folder: for the noisy files.
    """
    noisy = []
    for draw in range(DRAWS):
        path = dithered_file(float32, int8, folder / f"noise{draw}.onnx", seed=draw)
        noisy.append(evaluate(Side("noise of int8", OnnxRunner(path)), samples.batches))
    return replace(samples, truth=replace(samples.truth, noisy=noisy, noise_name=NOISE_NAME))


def dithered_file(float32: Path, int8: Path, path: Path, *, seed: int) -> Path:
    """Writes the float32 file to `path`, with noise where the int8 file rounds.

    Raises ExportError where the int8 file rounds nothing, or what the float32 file has not: it is
    that of another model.
    """
    model = load_graph(float32)
    beside = bool(external_files(model))
    load_external(float32, model)
    steps = rounding_steps(int8)
    generator = np.random.default_rng(seed)
    _check_same_nodes(float32, model, int8, steps)
    for node in list(model.graph):
        for index, value in enumerate(node.inputs):
            step = steps.get((node.name or "", index))
            if step is None or value is None:
                continue
            if value.const_value is not None:
                value.const_value = _dithered(value.const_value, *step, generator)
                continue
            noise = _noise_nodes(
                value, f"{node.name}.{index}", float(step[0].item()), int(generator.integers(2**31))
            )
            model.graph.insert_before(node, noise)
            node.replace_input_with(index, noise[-1].outputs[0])
    save_model(model, path, beside=beside)
    return path


def _check_same_nodes(float32: Path, model: ir.Model, int8: Path, steps: Steps) -> None:
    """Refuses another model: a right file without noise on all that is rounded would fail."""
    if not steps:
        raise ExportError(f"{int8}: holds no int8: no node reads what DequantizeLinear gives")
    there = {(node.name, index) for node in model.graph for index in range(len(node.inputs))}
    if missing := [node for node, index in steps if (node, index) not in there]:
        raise ExportError(
            f"{int8}: rounds what {missing[0]} reads, and {float32} has no such node: it is not "
            "the float32 file of that model. Give the model, or the file that it was made of"
        )


def rounding_steps(path: Path) -> Steps:
    """Reads where an int8 file rounds, and in which steps."""
    model = load_graph(path)
    load_external(path, model)
    steps = {}
    for node in model.graph.all_nodes():
        for index, value in enumerate(node.inputs):
            source = restoring_node(value)
            if source is None:
                continue
            scale = source.inputs[1] if len(source.inputs) > 1 else None
            if scale is None or scale.const_value is None:
                raise ExportError(f"{path}: node {source.name}: its scale is no weight of the file")
            axis = next(iter(ints_of(source, "axis")), 1)
            steps[node.name or "", index] = (values_of(scale.const_value), axis)
    return steps


def _dithered(
    tensor: ir.TensorProtocol, step: np.ndarray, axis: int, generator: np.random.Generator
) -> ir.TensorProtocol:
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    values = values_of(tensor)
    shape = [1] * values.ndim
    if step.ndim:
        shape[axis] = step.size
    noise = generator.uniform(-0.5, 0.5, values.shape) * step.reshape(shape)
    return onnx_ir.tensor((values + noise).astype(values.dtype), name=tensor.name)


def _noise_nodes(value: ir.Value, name: str, step: float, seed: int) -> list[ir.Node]:
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    draw = {"low": -step / 2, "high": step / 2, "seed": float(seed)}
    noise = onnx_ir.node(
        *("RandomUniformLike", [value], draw),
        outputs=[onnx_ir.val(f"{name}.noise")],
        name=f"{name}.noise",
    )
    total = onnx_ir.node(
        *("Add", [value, noise.outputs[0]]),
        outputs=[onnx_ir.val(f"{name}.noisy")],
        name=f"{name}.noisy",
    )
    return [noise, total]
