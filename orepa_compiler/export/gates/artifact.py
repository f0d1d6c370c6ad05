"""Checks that an ONNX file is what was asked for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.export import ExportedProgram
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.gates.counting import Counts, check_counts
from orepa_compiler.export.onnx.annotation import axes_of
from orepa_compiler.export.onnx.inspection import (
    ConvNode,
    conv_nodes,
    foldable_norms_in_file,
    parallel_convs,
    value_names,
)
from orepa_compiler.export.onnx.precision import lies_in
from orepa_compiler.export.onnx.program import named_outputs
from orepa_compiler.export.onnx.reading import load_graph

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Expected:
    """What an ONNX file must hold.

    counts: what the collapsed model runs. modules: every module path of the torch model -> the
    shape of its weight where it is a conv. kept: the modules that stay in float32. inputs: their
    names, where they were given.
    """

    counts: Counts
    outputs: tuple[str, ...]
    modules: dict[str, tuple[int, ...] | None]
    element_type: str
    dynamic_batch: bool
    opset: int
    kept: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    dynamic_size: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        program: ExportedProgram,
        *,
        element_type: str,
        dynamic_batch: bool,
        opset: int,
        kept: tuple[str, ...] = (),
        inputs: tuple[str, ...] = (),
        output_names: tuple[str, ...] = (),
        dynamic_size: bool = False,
    ) -> Expected:
        """Says what the export of a traced model must hold; inputs, output_names: as given."""
        return cls(
            counts=Counts.of_program(program),
            outputs=named_outputs(program, output_names, inputs),
            modules={
                path: tuple(module.weight.shape) if isinstance(module, _ConvNd) else None
                for path, module in model.named_modules(remove_duplicate=False)
            },
            element_type=element_type,
            dynamic_batch=dynamic_batch,
            opset=opset,
            kept=kept,
            inputs=inputs,
            dynamic_size=dynamic_size,
        )


def check_artifact(path: Path, expected: Expected) -> None:
    """Raises ExportError where the ONNX file at `path` is not what was expected."""
    onnx = import_extra("onnx", extra="onnx")
    model = load_graph(path)
    convs = conv_nodes(model)
    # First what tells a user most; the checker's own words come last.
    check_precision(convs, expected.element_type, kept=expected.kept)
    check_collapsed(model, convs, expected.counts)
    _check_modules(convs, expected)
    _check_interface(model, expected)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"onnx.checker refuses the exported file: {reason}") from error


def check_precision(
    convs: list[ConvNode], element_type: str, *, kept: Collection[str] = ()
) -> None:
    """Raises ExportError where a conv reads or multiplies another type than `element_type`.

    In the modules that were kept in float32, that is the type.
    """
    for conv in convs:
        wanted = "FLOAT" if lies_in(conv.module, kept) else element_type
        if (conv.input_type, conv.weight_type) != (wanted, wanted):
            raise ExportError(
                f"the conv's input is {conv.input_type} and its weight {conv.weight_type}, but "
                f"{wanted} was asked for; look for casts in the model's forward",
                path=conv.where,
            )


def _check_modules(convs: list[ConvNode], expected: Expected) -> None:
    for conv in convs:
        shape = expected.modules.get(conv.module or "")
        known = conv.module is not None and conv.module in expected.modules
        # A weight that is quantized, or made in the forward, comes from a node: it has no shape.
        other = shape is not None and conv.weight_shape not in ((), shape)
        if not known or other:
            raise ExportError(
                f"node {conv.name} names the torch module {conv.module!r} (weight {shape}), which "
                f"does not fit its weight {conv.weight_shape}"
            )


def check_collapsed(model: ir.Model, convs: list[ConvNode], counts: Counts | None = None) -> None:
    """Raises ExportError where a norm or a parallel conv is left that a collapse folds.

    Also where the file holds other convs, or more sums or norms, than `counts`: by default what
    the file's metadata says that the collapsed model runs, where it says so.
    """
    norms = foldable_norms_in_file(model)
    if norms:
        raise ExportError(
            f"not collapsed: a BatchNormalization straight after a conv ({len(norms)} of them); "
            "call orepa.collapse(model) and export again",
            path=norms[0],
        )
    pairs = parallel_convs(model, convs)
    if pairs:
        first, second = pairs[0]
        raise ExportError(
            f"not collapsed: its conv and {second.where}'s read the same tensor and are added up "
            f"({len(pairs)} such pairs); call orepa.collapse(model) and export again",
            path=first.where,
        )
    wanted = counts or Counts.recorded(model.metadata_props)
    if wanted is not None:
        check_counts(Counts.of_graph(model), wanted)


def _check_interface(model: ir.Model, expected: Expected) -> None:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset != expected.opset:
        raise ExportError(
            f"the file has operator set {opset}, not {expected.opset}; pass opset={opset} or none"
        )
    outputs = tuple(value_names(model.graph.outputs))
    if outputs != expected.outputs:
        raise ExportError(
            f"the file returns {', '.join(outputs)}, but the model {', '.join(expected.outputs)}"
        )
    inputs = tuple(value_names(model.graph.inputs))
    if expected.inputs and inputs != expected.inputs:
        raise ExportError(
            f"the file takes {', '.join(inputs)}, but was to take {', '.join(expected.inputs)}"
        )
    if expected.dynamic_batch:
        _check_batch(model.graph)
    if expected.dynamic_size:
        _check_sizes(model.graph)


def _check_batch(graph: ir.Graph) -> None:
    for value in graph.inputs:
        axes = axes_of(value)
        if axes and axes[0] != "batch":
            raise ExportError(
                f"input {value.name}: its first axis is {axes[0]}, not the symbol batch; pass "
                "dynamic_batch=False to export a fixed batch size"
            )
    for value in graph.outputs:
        axes = axes_of(value)
        if not any("batch" in axis for axis in axes if isinstance(axis, str)):
            raise ExportError(
                f"output {value.name}: its shape {axes} does not depend on the batch size; pass "
                "dynamic_batch=False to export a fixed one"
            )


def _check_sizes(graph: ir.Graph) -> None:
    for value in graph.inputs:
        sizes = axes_of(value)[2:]
        if len(sizes) in (2, 3) and not all(isinstance(size, str) and size for size in sizes):
            raise ExportError(
                f"dynamic_size: input {value.name} has sizes {sizes} in the file; leave it out"
            )
