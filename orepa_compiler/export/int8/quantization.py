"""int8 as Q/DQ nodes in the ONNX graph, in the form that TensorRT parses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from orepa_compiler.choices import Preset
from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.external_data import external_files
from orepa_compiler.export.onnx.inspection import torch_module, value_names
from orepa_compiler.export.onnx.precision import lies_in
from orepa_compiler.export.onnx.program import quiet
from orepa_compiler.export.onnx.reading import load_graph, values_of
from orepa_compiler.export.onnx.rewriting import replace_file
from orepa_compiler.export.run.session import to_numpy

if TYPE_CHECKING:
    import onnx_ir as ir

# What multiplies: all else is as fast in the precision that its neighbours have.
QUANTIZED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# TensorRT's parser takes zero points of 0 and float biases only; and it fuses a conv with what
# follows it, which a quantized output would keep apart.
_TENSORRT_SAFE = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": list(QUANTIZED),
}


# For CPUs: maps in uint8, kernels of 7 bits (x86 without VNNI adds two products in 16 bits), and
# what a conv gives is quantized too, so that onnxruntime runs it in integers.
_CPU = {"WeightSymmetric": True, "ActivationSymmetric": False}


def calibration_batches(
    calibration: Sequence[Any] | None, batch: tuple[Any, ...]
) -> list[tuple[Any, ...]]:
    """Gives the batches of calibration data as tuples of arguments, each of the kind of `batch`.

    Raises ExportError where there are none, and for one whose number of tensors, types or shapes
    (but for the first axis) are not those of `batch`.
    """
    given = [calibration] if isinstance(calibration, (Tensor, tuple)) else list(calibration or [])
    if not given:
        raise ExportError(
            "int8 needs calibration data, from which the ranges of the values are taken; give "
            "batches of real inputs (calibration=..., or --calibration)"
        )
    batches = [entry if isinstance(entry, tuple) else (entry,) for entry in given]
    wanted = [(t.shape[1:], t.dtype) for t in _tensors(batch)]
    for index, entry in enumerate(batches):
        found = [(t.shape[1:], t.dtype) for t in _tensors(entry)]
        if found != wanted:
            raise ExportError(
                f"calibration batch {index} holds {_describe(entry)}, but the model takes "
                f"{_describe(batch)}, of any first axis"
            )
    return batches


def _tensors(batch: tuple[Any, ...]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def _describe(batch: tuple[Any, ...]) -> str:
    texts = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in _tensors(batch)]
    return " and ".join(texts) or f"no tensor ({type(batch[0]).__name__})"


def quantize_file(
    path: Path,
    batches: Sequence[tuple[Any, ...]],
    *,
    keep: Collection[str] = (),
    preset: Preset = "tensorrt",
) -> None:
    """Rewrites the float32 ONNX file at `path` with int8 weights and activations as Q/DQ nodes.

    Symmetric everywhere, weights with a scale for each output channel, biases in float. The ranges
    of the activations are the largest magnitudes on `batches`. keep: the torch modules whose nodes
    stay in float32. preset: "cpu" has uint8 maps with a zero point, 7-bit weights and biases in
    int32, and quantizes all operators that onnxruntime has in integers.
    Raises ExportError where nothing is quantized, or not in that form; MissingPackage without
    onnxruntime.
    """
    quantization = import_extra("onnxruntime.quantization", extra="cpu")
    kinds = quantization.QuantType
    model = load_graph(path)
    nodes = model.graph.all_nodes()
    kept = [node.name or "" for node in nodes if lies_in(torch_module(node), keep)]
    candidate = path.with_name(f"quantized-{path.name}")
    with quiet():
        quantization.quantize_static(
            str(path),
            str(candidate),
            _reader(quantization, value_names(model.graph.inputs), batches),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED) if preset == "tensorrt" else None,
            per_channel=True,
            reduce_range=preset == "cpu",
            activation_type=kinds.QInt8 if preset == "tensorrt" else kinds.QUInt8,
            weight_type=kinds.QInt8,
            nodes_to_exclude=kept,
            use_external_data_format=bool(external_files(model)),
            extra_options=_TENSORRT_SAFE if preset == "tensorrt" else _CPU,
        )
    check_quantized(candidate, keep=keep, preset=preset)
    replace_file(path, candidate)


def _reader(quantization: Any, names: list[str], batches: Sequence[tuple[Any, ...]]) -> Any:
    # The base class belongs to onnxruntime, so the class is made here.
    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds: Iterator[tuple[Any, ...]] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.feeds, None)
            if batch is None:
                return None
            return dict(zip(names, map(to_numpy, _tensors(batch)), strict=True))

    return Reader()


def check_quantized(
    path: Path,
    *,
    keep: Collection[str] = (),
    trained: Collection[str] | None = None,
    preset: Preset = "tensorrt",
) -> None:
    """Raises ExportError where what multiplies does not read int8 in the form of the preset.

    Modules in `keep` must not read it at all; nor any but those that were trained for it.
    """
    count = 0
    for node in load_graph(path).graph.all_nodes():
        if node.op_type not in QUANTIZED:
            continue
        sources = [restoring_node(value) for value in node.inputs]
        restored = [source is not None for source in sources]
        wanted = [True, True] + [False] * (len(restored) - 2)
        is_float = (
            lies_in(torch_module(node), keep)
            if trained is None
            else (torch_module(node) not in trained)
        )
        if is_float:
            wanted = [False] * len(restored)
        else:
            count += 1
        if preset == "cpu" and trained is None:
            # what a neighbour gives is quantized already, and a bias may be
            free = (0, 2) if is_float else (2,)
            wanted = [restored[n] if n in free else w for n, w in enumerate(wanted)]
        if restored != wanted:
            raise ExportError(
                f"node {node.name} ({node.op_type}): the inputs that are int8 are {restored}, not "
                f"{wanted} (input, weight, bias)",
                path=torch_module(node),
            )
        for source in (source for source in sources if source is not None):
            if preset == "tensorrt" and not _has_no_zero_point(source):
                raise ExportError(
                    f"node {source.name} has a zero point that is not 0, which TensorRT refuses",
                    path=torch_module(node),
                )
    if not count:
        raise ExportError(
            f"nothing to quantize: no {', '.join(QUANTIZED)} outside of what is kept in float32"
        )


def restoring_node(value: ir.Value | None) -> ir.Node | None:
    """Finds the DequantizeLinear node that makes a value; None where another node does."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _has_no_zero_point(node: ir.Node) -> bool:
    """Whether the zero point of a DequantizeLinear node is left out, or 0."""
    points = node.inputs[2:]
    if not points:
        return True
    tensor = points[0].const_value if points[0] is not None else None
    return tensor is not None and not values_of(tensor).any()
