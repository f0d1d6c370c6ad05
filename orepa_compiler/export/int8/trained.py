"""Trained ranges as Q/DQ nodes: the integers and the steps of a model that rounds, as they are.

Nothing is rounded here. A kernel comes as the integers that the model itself says it runs; the maps
that go into a layer get its step and zero point.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from orepa_compiler.choices import Preset
from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError, ReparamError
from orepa_compiler.export.int8.quantization import QUANTIZED
from orepa_compiler.export.onnx.external_data import external_files, load_external
from orepa_compiler.export.onnx.inspection import ints_of, torch_module
from orepa_compiler.export.onnx.precision import lies_in
from orepa_compiler.export.onnx.reading import load_graph, values_of
from orepa_compiler.export.onnx.rewriting import replace_file, save_model
from orepa_compiler.quantization.layers import Rounded, rounded_layers
from orepa_compiler.quantization.quantizers import check_range, preset_of

if TYPE_CHECKING:
    import onnx_ir as ir


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
        """Reads what a layer was trained with. Raises ExportError where its maps have no range."""
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
    """Collects what the file is to hold of each layer that rounds and is not kept in float."""
    return {
        path: TrainedLayer.of(layer, path)
        for path, layer in rounded_layers(model).items()
        if not lies_in(path, keep)
    }


def trained_preset(model: nn.Module) -> Preset | None:
    """Finds the preset that a model was trained for; None where it does not round.

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
    model = load_graph(path)
    beside = bool(external_files(model))
    load_external(path, model)
    writing = _Writing(model.graph)
    for node in list(model.graph):
        place = torch_module(node)
        if node.op_type in QUANTIZED and place is not None and place in layers:
            writing.quantize(node, place, layers[place])
    missing = [place for place in layers if place not in writing.written]
    if missing:
        raise ExportError(
            f"it was trained to round to int8 ({len(missing)} such layers), and no {_KINDS} of the "
            "file comes from it: the forward does not call it; leave it out of fake_quantize",
            path=missing[0],
        )
    _drop_unread(model.graph)
    candidate = path.with_name(f"quantized-{path.name}")
    save_model(model, candidate, beside=beside)
    replace_file(path, candidate)


_KINDS = " or ".join((", ".join(QUANTIZED[:-1]), QUANTIZED[-1]))


@dataclass
class _Writing:
    """A graph on its way. made: the rounded values, by what they are made of."""

    graph: ir.Graph
    made: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def quantize(self, node: ir.Node, place: str, layer: TrainedLayer) -> None:
        """Lets a node read the integers and the rounded maps of a layer."""
        maps, kernel = node.inputs[:2]
        assert maps is not None
        if kernel is None or kernel.const_value is None:
            raise ExportError(
                f"node {node.name} ({node.op_type}) reads a kernel that is made in the graph, so "
                "it is not what was trained",
                path=place,
            )
        axis = output_axis(node)
        values = values_of(kernel.const_value)
        integers = layer.integers if axis == 0 else layer.integers.T
        by_axis = [-1 if index == axis else 1 for index in range(values.ndim)]
        wanted = integers * layer.steps.reshape(by_axis) if values.ndim == integers.ndim else None
        if wanted is None or wanted.shape != values.shape or not np.allclose(values, wanted, 1e-5):
            raise ExportError(
                f"node {node.name} ({node.op_type}) multiplies by {kernel.name}, which is not the "
                "kernel that this layer was trained with",
                path=place,
            )
        rounded = self._maps(node, maps, layer), self._kernel(node, kernel, integers, layer, axis)
        for index, value in enumerate(rounded):
            node.replace_input_with(index, value)
        self.written.add(place)

    def _kernel(
        self, node: ir.Node, kernel: ir.Value, integers: np.ndarray, layer: TrainedLayer, axis: int
    ) -> ir.Value:
        key = ("kernel", kernel.name, axis)
        if key not in self.made:
            name, points = kernel.name, np.zeros(len(layer.steps), np.int8)
            parts = [
                self._constant(f"{name}_quantized", integers),
                self._constant(f"{name}_scale", layer.steps),
                self._constant(f"{name}_zero_point", points),
            ]
            self.made[key] = self._before(
                node, "DequantizeLinear", parts, f"{name}_dequantized", {"axis": axis}
            )
        return self.made[key]

    def _maps(self, node: ir.Node, maps: ir.Value, layer: TrainedLayer) -> ir.Value:
        key = ("maps", maps.name, layer.step.item(), layer.point.item(), layer.point.dtype)
        if key not in self.made:
            count = sum(other[:2] == key[:2] for other in self.made)
            own = f"{maps.name}_{count}" if count else maps.name
            scale = self._constant(f"{own}_scale", np.array(layer.step))
            point = self._constant(f"{own}_zero_point", layer.point)
            parts = [maps, scale, point]
            rounded = self._before(node, "QuantizeLinear", parts, f"{own}_quantized")
            parts = [rounded, scale, point]
            self.made[key] = self._before(node, "DequantizeLinear", parts, f"{own}_dequantized")
        return self.made[key]

    def _before(
        self,
        node: ir.Node,
        kind: str,
        inputs: Sequence[ir.Value],
        output: str,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        """Puts a new node before `node`, and gives what it makes."""
        onnx_ir = import_extra("onnx_ir", extra="onnx")
        made: ir.Value = onnx_ir.val(output)
        name = f"{output}_{kind}"
        new = onnx_ir.node(kind, inputs, attributes, outputs=[made], name=name)
        self.graph.insert_before(node, new)
        return made

    def _constant(self, name: str, values: np.ndarray) -> ir.Value:
        onnx_ir = import_extra("onnx_ir", extra="onnx")
        tensor = onnx_ir.tensor(np.ascontiguousarray(values), name=name)
        value: ir.Value = onnx_ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _drop_unread(graph: ir.Graph) -> None:
    """Takes out the weights that nobody reads."""
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]


def output_axis(node: ir.Node) -> int:
    """Tells along which axis of its kernel the output channels of a node lie."""
    if node.op_type == "Gemm":
        return 0 if any(ints_of(node, "transB")) else 1
    return 1 if node.op_type == "MatMul" else 0
