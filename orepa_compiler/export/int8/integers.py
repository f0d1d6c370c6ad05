"""Reads the integers and steps of an int8 file, and compares them element by element."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.int8.quantization import QUANTIZED
from orepa_compiler.export.int8.trained import TrainedLayer, output_axis
from orepa_compiler.export.onnx.external_data import load_external
from orepa_compiler.export.onnx.inspection import load_graph, makers, torch_module, walk


@dataclass(frozen=True)
class FileLayer:
    """What a file holds of one node that multiplies: its torch module, and as in TrainedLayer."""

    node: str
    place: str | None
    layer: TrainedLayer


def file_layers(path: Path) -> Iterator[FileLayer]:
    """Every node of an ONNX file that multiplies int8 by int8."""
    onnx = import_extra("onnx", extra="onnx")
    model = load_graph(path)
    load_external(path, model)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    made = makers(model.graph)

    def read(name: str) -> np.ndarray:
        array: np.ndarray = onnx.numpy_helper.to_array(values[name])
        return array

    for node in walk(model.graph):
        sources = [made.get(name) for name in node.input[:2]]
        if node.op_type not in QUANTIZED or not all(map(_is_restored, sources)):
            continue
        maps, kernel = sources
        assert maps is not None
        assert kernel is not None
        integers = read(kernel.input[0])
        integers = integers.T if output_axis(node) else integers
        layer = TrainedLayer(
            *(integers, read(kernel.input[1])),
            *(np.float32(read(maps.input[1]).item()), read(maps.input[2])),
        )
        yield FileLayer(node.name, torch_module(node), layer)


def check_integers(path: Path, layers: Mapping[str, TrainedLayer]) -> int:
    """How many integers the file at `path` shares with the layers, which are all that it has.

    Raises ExportError for the first layer whose kernel, steps, or range of maps is another one.
    """
    count, seen = 0, set()
    for found in file_layers(path):
        if found.place is None or found.place not in layers:
            raise ExportError(
                f"{path}: node {found.node} is int8, and the model does not round there",
                path=found.place,
            )
        seen.add(found.place)
        if reason := difference(layers[found.place], found.layer):
            raise ExportError(f"{path}: {reason}", path=found.place)
        count += found.layer.integers.size
    missing = [place for place in layers if place not in seen]
    if missing:
        raise ExportError(f"{path}: no int8 node of the file comes from it", path=missing[0])
    return count


def difference(trained: TrainedLayer, found: TrainedLayer) -> str:
    """In what a layer of a file is not the trained one; "" where they are equal."""
    if trained.integers.shape != found.integers.shape:
        return f"its kernel is {found.integers.shape}, and was trained as {trained.integers.shape}"
    wrong = int((trained.integers != found.integers).sum())
    if wrong:
        return f"{wrong} of {trained.integers.size} integers of its kernel are not the trained ones"
    if not np.array_equal(trained.steps, found.steps):
        return "the steps of its kernel are not the trained ones"
    if trained.step != found.step or trained.point != found.point:
        return (
            f"its maps have the step {found.step:.6g} and the zero point {found.point}, and were "
            f"trained with {trained.step:.6g} and {trained.point}"
        )
    return "" if trained.point.dtype == found.point.dtype else "its maps are of another type"


def _is_restored(source: Any) -> bool:
    return source is not None and source.op_type == "DequantizeLinear"
