"""Trained ranges as Q/DQ nodes: the integers and the steps of a model that rounds, as they are.

Nothing is rounded here. A kernel comes as the integers that the model itself says it runs; the maps
that go into a layer get its step and zero point.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from orepa_compiler.choices import Preset
from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError, ReparamError
from orepa_compiler.export.int8.quantization import QUANTIZED
from orepa_compiler.export.onnx.inspection import load_graph, torch_module, walk
from orepa_compiler.export.onnx.precision import lies_in
from orepa_compiler.export.onnx.rewriting import replace_file, save_like
from orepa_compiler.quantization.layers import Rounded, rounded_layers
from orepa_compiler.quantization.quantizers import check_range, preset_of


@dataclass(frozen=True)
class TrainedLayer:
    """What the file holds of a layer.

    integers: int8, (C_out, ...). steps: (C_out,). step, point: of the maps that go in; a point of
    np.int8 or np.uint8, which is their type.
    """

    integers: np.ndarray
    steps: np.ndarray
    step: np.float32
    point: np.ndarray

    @classmethod
    @torch.no_grad()
    def of(cls, layer: Rounded, path: str) -> TrainedLayer:
        """What a layer was trained with. Raises ExportError where its maps have no range."""
        try:
            check_range(layer.input_quantizer, path)
        except ReparamError as error:
            raise ExportError(error.reason, path=path) from error
        maps = layer.input_quantizer
        kind = np.uint8 if preset_of(maps) == "cpu" else np.int8
        return cls(
            layer.integers().cpu().numpy(),
            layer.weight_quantizer.scale.float().cpu().numpy(),
            np.float32(maps.scale.item()),
            np.array(int(maps.zero_point), kind),
        )


def trained_layers(model: nn.Module, *, keep: Collection[str] = ()) -> dict[str, TrainedLayer]:
    """What the file is to hold of each layer that rounds, without those that are kept in float."""
    return {
        path: TrainedLayer.of(layer, path)
        for path, layer in rounded_layers(model).items()
        if not lies_in(path, keep)
    }


def trained_preset(model: nn.Module) -> Preset | None:
    """The preset that a model was trained for; None where it does not round.

    Raises ExportError where its layers were trained for several.
    """
    found = {path: preset_of(m.input_quantizer) for path, m in rounded_layers(model).items()}
    if len(set(found.values())) > 1:
        raise ExportError(f"its layers were trained for other presets: {found}")
    return next(iter(found.values()), None)


def write_trained(path: Path, layers: Mapping[str, TrainedLayer]) -> None:
    """Rewrites the float32 ONNX file at `path` with Q/DQ nodes around the layers that were trained.

    Raises ExportError for a layer that has no node of its own in the graph, and for one whose node
    does not multiply by its kernel.
    """
    onnx = import_extra("onnx", extra="onnx")
    before, model = load_graph(path), onnx.load(path)
    writing = _Writing(model)
    for node in model.graph.node:
        place = torch_module(node)
        if node.op_type in QUANTIZED and place is not None and place in layers:
            writing.quantize(node, place, layers[place])
        writing.nodes.append(node)
    missing = [place for place in layers if place not in writing.written]
    if missing:
        raise ExportError(
            f"it was trained to round to int8 ({len(missing)} such layers), and no {_KINDS} of the "
            "file comes from it: the forward does not call it; leave it out of fake_quantize",
            path=missing[0],
        )
    writing.finish()
    candidate = path.with_name(f"quantized-{path.name}")
    save_like(before, model, candidate)
    replace_file(path, candidate)


_KINDS = " or ".join((", ".join(QUANTIZED[:-1]), QUANTIZED[-1]))


@dataclass
class _Writing:
    """A graph on its way. nodes: those so far, in order; made: the names of rounded values."""

    model: Any
    nodes: list[Any] = field(default_factory=list)
    made: dict[tuple[Any, ...], str] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.new: list[Any] = []

    def quantize(self, node: Any, place: str, layer: TrainedLayer) -> None:
        kernel = node.input[1]
        if kernel not in self.weights:
            raise ExportError(
                f"node {node.name} ({node.op_type}) reads a kernel that is made in the graph, so "
                "it is not what was trained",
                path=place,
            )
        axis = output_axis(node)
        onnx = import_extra("onnx", extra="onnx")
        values = onnx.numpy_helper.to_array(self.weights[kernel])
        integers = layer.integers if axis == 0 else layer.integers.T
        by_axis = [-1 if index == axis else 1 for index in range(values.ndim)]
        wanted = integers * layer.steps.reshape(by_axis) if values.ndim == integers.ndim else None
        if wanted is None or wanted.shape != values.shape or not np.allclose(values, wanted, 1e-5):
            raise ExportError(
                f"node {node.name} ({node.op_type}) multiplies by {kernel}, which is not the "
                "kernel that this layer was trained with",
                path=place,
            )
        node.input[0] = self._maps(node.input[0], layer)
        node.input[1] = self._kernel(kernel, integers, layer.steps, axis)
        self.written.add(place)

    def _kernel(self, name: str, integers: np.ndarray, steps: np.ndarray, axis: int) -> str:
        key = ("kernel", name, axis)
        if key not in self.made:
            points = np.zeros(len(steps), np.int8)
            parts = [
                self._constant(f"{name}_quantized", integers),
                self._constant(f"{name}_scale", steps),
                self._constant(f"{name}_zero_point", points),
            ]
            self.made[key] = self._node("DequantizeLinear", parts, f"{name}_dequantized", axis=axis)
        return self.made[key]

    def _maps(self, name: str, layer: TrainedLayer) -> str:
        key = ("maps", name, layer.step.item(), layer.point.item(), layer.point.dtype)
        if key not in self.made:
            count = sum(other[:2] == key[:2] for other in self.made)
            own = f"{name}_{count}" if count else name
            scale = self._constant(f"{own}_scale", np.array(layer.step))
            point = self._constant(f"{own}_zero_point", layer.point)
            rounded = self._node("QuantizeLinear", [name, scale, point], f"{own}_quantized")
            restored = [rounded, scale, point]
            self.made[key] = self._node("DequantizeLinear", restored, f"{own}_dequantized")
        return self.made[key]

    def _node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        onnx = import_extra("onnx", extra="onnx")
        name = f"{output}_{kind}"
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], name, **attributes))
        return output

    def _constant(self, name: str, values: np.ndarray) -> str:
        onnx = import_extra("onnx", extra="onnx")
        self.new.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def finish(self) -> None:
        """Puts the new nodes and weights into the graph, without the weights nobody reads now."""
        graph = self.model.graph
        read = {name for node in self.nodes for name in node.input}
        read |= {name for node in walk(graph) for name in node.input}
        read |= {value.name for value in graph.output}
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend([*kept, *self.new])


def output_axis(node: Any) -> int:
    """Along which axis of its kernel the output channels of a node lie."""
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return 1 if node.op_type == "MatMul" else 0
