"""Measures the noise that int8 must have: each rounding replaced by random noise.

Rounding to steps of size s moves a value by up to s/2 either way. So every tensor that the int8
file quantizes gets, in a copy of the float32 file, noise drawn evenly from [-s/2, s/2]. What comes
out is as far from the truth as int8 with these ranges has to be, and an int8 file that is much
farther is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.external_data import load_external
from orepa_compiler.export.onnx.inspection import load_graph, makers, walk
from orepa_compiler.export.onnx.rewriting import save_like
from orepa_compiler.export.run.runners import OnnxRunner
from orepa_compiler.verification import Samples
from orepa_compiler.verification.evaluation import Side, evaluate

# How often the noise is drawn.
DRAWS = 2

# By node and input, the step of the rounding and, of several steps, along which axis.
Steps = dict[tuple[str, int], tuple[np.ndarray, int]]

# What messages call it.
NOISE_NAME = "int8 with these ranges"


def with_int8_noise(samples: Samples, float32: Path, int8: Path, folder: Path) -> Samples:
    """The samples of a model, with the noise of int8 in the place of its own precision's.

    float32, int8: the ONNX files of the model. folder: for the noisy files.
    """
    noisy = []
    for draw in range(DRAWS):
        path = dithered_file(float32, int8, folder / f"noise{draw}.onnx", seed=draw)
        noisy.append(evaluate(Side("noise of int8", OnnxRunner(path)), samples.batches))
    return replace(samples, truth=replace(samples.truth, noisy=noisy, noise_name=NOISE_NAME))


def dithered_file(float32: Path, int8: Path, path: Path, *, seed: int) -> Path:
    """The float32 file with noise where the int8 file rounds, written to `path`.

    Raises ExportError where the int8 file rounds nothing, or what the float32 file has not: it is
    that of another model.
    """
    onnx = import_extra("onnx", extra="onnx")
    before = load_graph(float32)
    model = onnx.load(float32)
    steps = rounding_steps(int8)
    generator = np.random.default_rng(seed)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    _check_same_nodes(float32, model, int8, steps)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            step = steps.get((node.name, index))
            if step is None:
                continue
            if name in weights:
                weights[name].CopyFrom(_dithered(weights[name], *step, generator))
                continue
            source = f"{node.name}.{index}"
            nodes += _noise_nodes(
                name, source, float(step[0].item()), int(generator.integers(2**31))
            )
            node.input[index] = f"{source}.noisy"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    save_like(before, model, path)
    return path


def _check_same_nodes(float32: Path, model: Any, int8: Path, steps: Steps) -> None:
    """Without noise on some of what is rounded, a right file would be far above the tolerance."""
    if not steps:
        raise ExportError(f"{int8}: holds no int8: no node reads what DequantizeLinear gives")
    there = {(node.name, index) for node in model.graph.node for index in range(len(node.input))}
    if missing := [node for node, index in steps if (node, index) not in there]:
        raise ExportError(
            f"{int8}: rounds what {missing[0]} reads, and {float32} has no such node: it is not "
            "the float32 file of that model. Give the model, or the file that it was made of"
        )


def rounding_steps(path: Path) -> Steps:
    """Where an int8 file rounds, and in which steps."""
    onnx = import_extra("onnx", extra="onnx")
    model = load_graph(path)
    load_external(path, model)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    made = makers(model.graph)
    steps = {}
    for node in walk(model.graph):
        for index, name in enumerate(node.input):
            source = made.get(name)
            if source is not None and source.op_type == "DequantizeLinear":
                axes = [a.i for a in source.attribute if a.name == "axis"]
                scale = onnx.numpy_helper.to_array(values[source.input[1]])
                steps[node.name, index] = (scale, axes[0] if axes else 1)
    return steps


def _dithered(tensor: Any, step: np.ndarray, axis: int, generator: np.random.Generator) -> Any:
    onnx = import_extra("onnx", extra="onnx")
    values = onnx.numpy_helper.to_array(tensor)
    shape = [1] * values.ndim
    if step.ndim:
        shape[axis] = step.size
    noise = generator.uniform(-0.5, 0.5, values.shape) * step.reshape(shape)
    return onnx.numpy_helper.from_array((values + noise).astype(values.dtype), tensor.name)


def _noise_nodes(name: str, source: str, step: float, seed: int) -> Sequence[Any]:
    make = import_extra("onnx", extra="onnx").helper.make_node
    draw = {"low": -step / 2, "high": step / 2, "seed": float(seed)}
    return (
        make("RandomUniformLike", [name], [f"{source}.noise"], f"{source}.noise", **draw),
        make("Add", [name, f"{source}.noise"], [f"{source}.noisy"], f"{source}.noisy"),
    )
