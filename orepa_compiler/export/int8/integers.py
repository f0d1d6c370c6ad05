"""Reads the integers and steps of an int8 file, and compares them element by element."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from orepa_compiler.errors import ExportError
from orepa_compiler.export.int8.quantization import QUANTIZED, restoring_node
from orepa_compiler.export.int8.trained import TrainedLayer, output_axis
from orepa_compiler.export.onnx.external_data import load_external
from orepa_compiler.export.onnx.inspection import torch_module
from orepa_compiler.export.onnx.reading import load_graph, values_of

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class FileLayer:
    """What a file holds of one node that multiplies: its torch module, and as in TrainedLayer."""

    node: str
    place: str | None
    layer: TrainedLayer


def file_layers(path: Path) -> Iterator[FileLayer]:
    """Reads every node of an ONNX file that multiplies int8 by int8."""
    model = load_graph(path)
    load_external(path, model)
    for node in model.graph.all_nodes():
        sources = [restoring_node(value) for value in node.inputs[:2]]
        if node.op_type not in QUANTIZED or len(sources) != 2:
            continue
        maps, kernel = sources
        if maps is None or kernel is None:
            continue
        integers = _read(path, kernel, 0)
        integers = integers.T if output_axis(node) else integers
        layer = TrainedLayer(
            *(integers, _read(path, kernel, 1)),
            *(np.float32(_read(path, maps, 1).item()), _read(path, maps, 2)),
        )
        yield FileLayer(node.name or "", torch_module(node), layer)


def _read(path: Path, node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        raise ExportError(
            f"{path}: node {node.name} ({node.op_type}): its input {index} is no weight of the file"
        )
    return values_of(value.const_value)


def check_integers(path: Path, layers: Mapping[str, TrainedLayer]) -> int:
    """Counts the integers that the file at `path` shares with the layers, all that it has.

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
    """Says in what a layer of a file is not the trained one; "" where they are equal."""
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
