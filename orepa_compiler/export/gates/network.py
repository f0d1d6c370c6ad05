"""Parses an ONNX file into a TensorRT network, and checks it before an engine is built."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from orepa_compiler.errors import ExportError
from orepa_compiler.export.gates.artifact import check_collapsed
from orepa_compiler.export.gates.counting import MAP_RANK, Counts
from orepa_compiler.export.onnx.inspection import (
    ConvNode,
    conv_nodes,
    node_outputs,
    torch_module,
)
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.export.tensorrt.flavors import Flavor, error_log, load_flavor

if TYPE_CHECKING:
    import onnx_ir as ir

# ONNX's name of an element type -> TensorRT's.
_TYPE_NAMES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16"}

# Part of a parser's message -> what helps. The first that is found is given.
_HINTS = {
    "BF16": "export with precision='fp16' or 'fp32'",
    "Plugin not found": "TensorRT does not know this operator; replace the layer before exporting",
    "DESERIALIZE": "export the ONNX file again",
}
_HINT = "replace this layer by one that TensorRT supports"


@dataclass(frozen=True)
class NetworkSummary:
    """What TensorRT's parser made of an ONNX file.

    adds: sums of two feature maps that depend on the input. norms: batch norms (scale layers) and
    normalization layers. dtypes: the type that convs read -> how many do. quantized: the convs that
    read values which were quantized just before.
    """

    layers: int
    convs: int
    adds: int
    norms: int
    dtypes: tuple[tuple[str, int], ...]
    quantized: int = 0

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in self.dtypes) or "none"
        quantized = f", {self.quantized} quantized" if self.quantized else ""
        return (
            f"{self.convs} convs ({dtypes}{quantized}), {self.adds} adds, {self.norms} norms, "
            f"{self.layers} layers"
        )


@dataclass(frozen=True)
class ParsedNetwork:
    """A TensorRT network and what must live as long as it does: the parser owns its weights.

    The bindings do not see to that: a parser without its network is a segmentation fault.
    """

    network: Any
    builder: Any
    parser: Any


def inspect_network(onnx: Path | str, *, flavor: Flavor = "auto") -> NetworkSummary:
    """Parses `onnx` with TensorRT and counts what it became, after build_engine's gates.

    Raises ExportError where the file cannot be parsed or is not collapsed.
    """
    tensorrt = load_flavor(flavor)
    parsed = parse_network(tensorrt, Path(onnx))
    return summarize(tensorrt, parsed.network)


def parse_network(tensorrt: ModuleType, source: Path) -> ParsedNetwork:
    """Parses an ONNX file into a TensorRT network, strongly typed, and checks it.

    Raises ExportError where TensorRT cannot parse it, or where check_network refuses it.
    """
    model = load_graph(source)
    log = error_log(tensorrt)
    log.errors.clear()
    builder = _builder(tensorrt, log)
    # Needed by 10, where precision was a builder flag; the only way, and ignored, in 11.
    typed = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        raise parse_error(parser, source, model)
    check_network(summarize(tensorrt, network), source, model)
    return ParsedNetwork(network, builder, parser)


def _builder(tensorrt: ModuleType, log: Any) -> Any:
    try:
        return tensorrt.Builder(log)
    except TypeError as error:  # how the bindings report that there is none
        reasons = " ".join(log.errors) or str(error)
        raise ExportError(
            f"{tensorrt.__name__} {tensorrt.__version__} cannot start here: {reasons}"
        ) from error


def summarize(tensorrt: ModuleType, network: Any) -> NetworkSummary:
    """Counts of what matters for a collapsed model in a parsed network."""
    kinds = tensorrt.LayerType
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    convs = [layer for layer in layers if layer.type == kinds.CONVOLUTION]
    dtypes = Counter(conv.get_input(0).dtype.name for conv in convs)
    restored = {layer.get_output(0).name for layer in layers if layer.type == kinds.DEQUANTIZE}
    return NetworkSummary(
        layers=len(layers),
        convs=len(convs),
        adds=_count_sums(tensorrt, network, layers),
        norms=sum(layer.type in (kinds.SCALE, kinds.NORMALIZATION) for layer in layers),
        dtypes=tuple(sorted(dtypes.items())),
        quantized=sum(conv.get_input(0).name in restored for conv in convs),
    )


def _count_sums(tensorrt: ModuleType, network: Any, layers: list[Any]) -> int:
    computed = {network.get_input(index).name for index in range(network.num_inputs)}
    count = 0
    for layer in layers:
        read = [layer.get_input(index) for index in range(layer.num_inputs)]
        names = {tensor.name for tensor in read if tensor is not None}
        if not computed.isdisjoint(names):
            computed.update(layer.get_output(index).name for index in range(layer.num_outputs))
        if computed.issuperset(names) and _is_add(tensorrt, layer):
            made = layer.get_output(0)
            count += made.dtype.name in _TYPE_NAMES.values() and len(made.shape) >= MAP_RANK
    return count


def _is_add(tensorrt: ModuleType, layer: Any) -> bool:
    if layer.type != tensorrt.LayerType.ELEMENTWISE:
        return False
    # get_layer gives the base class; this is how the bindings expose a layer's own attributes.
    layer.__class__ = tensorrt.IElementWiseLayer
    return bool(layer.op == tensorrt.ElementWiseOperation.SUM)


def check_network(summary: NetworkSummary, source: Path, model: ir.Model) -> None:
    """Raises ExportError where the network differs from its ONNX file, or is not collapsed."""
    convs = conv_nodes(model)
    check_collapsed(model, convs)
    _check_counts(summary, source, model)
    wanted = _dtypes(convs)
    if summary.dtypes != wanted:
        raise ExportError(
            f"{source}: the ONNX convs read {dict(wanted)}, but those of TensorRT's network "
            f"{dict(summary.dtypes)}; the engine would not have the precision of the file"
        )
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "DequantizeLinear"]
    restored = {name for node in nodes for name in node_outputs(node)}
    quantized = sum(conv.input in restored for conv in convs)
    if summary.quantized != quantized:
        raise ExportError(
            f"{source}: {quantized} convs of the ONNX graph read quantized values, but "
            f"{summary.quantized} of TensorRT's network; the engine would not be int8"
        )


def _check_counts(summary: NetworkSummary, source: Path, model: ir.Model) -> None:
    counts, kinds = Counts.of_graph(model), [node.op_type for node in model.graph.all_nodes()]
    if summary.convs != counts.convs:
        raise ExportError(
            f"{source}: the ONNX graph has {counts.convs} Conv nodes, but TensorRT's network "
            f"{summary.convs}; its parser rewrote some, so the engine would not be this graph"
        )
    norms = sum(kind.endswith("Normalization") for kind in kinds)
    if summary.adds > counts.sums or summary.norms > norms:
        raise ExportError(
            f"{source}: the ONNX graph has {counts.sums} sums of feature maps and {norms} norms, "
            f"but TensorRT's network {summary.adds} and {summary.norms}: not collapsed; its parser "
            "rewrote some, so the engine would not be this graph"
        )


def _dtypes(convs: list[ConvNode]) -> tuple[tuple[str, int], ...]:
    names = (_TYPE_NAMES.get(conv.input_type, conv.input_type) for conv in convs)
    return tuple(sorted(Counter(names).items()))


def parse_error(parser: Any, source: Path, model: ir.Model) -> ExportError:
    """Words the parser's first error: the torch module, the node, the reason and what helps."""
    if not parser.num_errors:
        return ExportError(f"{source}: TensorRT cannot parse the file and gives no reason")
    error = parser.get_error(0)
    description, nodes = error.desc(), model.graph
    is_known = 0 <= error.node() < len(nodes)
    module = torch_module(nodes[error.node()]) if is_known else None
    text = f"{error.code()} {description}"
    hint = next((hint for mark, hint in _HINTS.items() if mark in text), _HINT)
    where = f"node {error.node_name() or error.node()} ({error.node_operator() or 'unknown'})"
    return ExportError(
        f"{source}: TensorRT cannot parse {where}: {description} "
        f"({parser.num_errors} such errors). {hint[0].upper()}{hint[1:]}",
        path=module,
    )
