"""Looks into an ONNX graph: its convs, their types, and the marks of a forgotten collapse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError

# The key under which every node keeps the path of the torch module it comes from.
MODULE_KEY = "orepa.module"


@dataclass(frozen=True)
class ConvNode:
    """One Conv node of an ONNX graph.

    module: the torch module it comes from, or None where the file does not say. input_type and
    weight_type: names of ONNX element types, such as FLOAT16. reach: per spatial axis, the first
    and last input position that the kernel reads, relative to the output position. dilated: the
    kernel skips input positions.
    """

    name: str
    module: str | None
    input: str
    weight: str
    output: str
    input_type: str
    weight_type: str
    weight_shape: tuple[int, ...]
    strides: tuple[int, ...]
    group: int
    reach: tuple[tuple[int, int], ...]
    dilated: bool

    @property
    def where(self) -> str:
        """The torch module where it is known, else the node."""
        return self.module or self.name or self.output


def load_graph(path: Path) -> Any:
    """The ONNX ModelProto at `path`, without external weights.

    Raises ExportError when there is no such file, or when it is not a whole ONNX file.
    """
    onnx = import_extra("onnx", extra="onnx")
    decode_error = import_extra("google.protobuf.message", extra="onnx").DecodeError
    if not path.is_file():
        raise ExportError(f"{path}: no such file; write it with orepa.export_onnx(model, ...)")
    try:
        model = onnx.load(path, load_external_data=False)
    except decode_error as error:
        raise ExportError(
            f"{path}: not a whole ONNX file ({path.stat().st_size} bytes; {error}); export it again"
        ) from error
    if not model.graph.node:
        raise ExportError(f"{path}: the ONNX file holds no nodes; export it again")
    return model


def walk(graph: Any) -> Iterator[Any]:
    """Every node of a graph, those inside If and Loop bodies included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from walk(body)


def makers(graph: Any) -> dict[str, Any]:
    """The node that makes each value, by the value's name."""
    return {output: node for node in walk(graph) for output in node.output}


def torch_module(node: Any) -> str | None:
    """The path of the torch module that a node comes from, or None where the file does not say."""
    return next((entry.value for entry in node.metadata_props if entry.key == MODULE_KEY), None)


def conv_nodes(model: Any) -> list[ConvNode]:
    """The Conv nodes of a model, in its order, with the element types that ONNX infers.

    Raises ExportError where the types contradict each other.
    """
    onnx = import_extra("onnx", extra="onnx")
    try:
        typed = onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"the ONNX graph contradicts itself: {error}; export it again") from error
    types = _element_types(typed.graph)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in typed.graph.initializer}
    convs = (node for node in walk(typed.graph) if node.op_type == "Conv")
    return [_conv_node(node, types, shapes) for node in convs]


def _element_types(graph: Any) -> dict[str, str]:
    onnx = import_extra("onnx", extra="onnx")
    name_of = onnx.TensorProto.DataType.Name
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: name_of(value.type.tensor_type.elem_type) for value in values}
    types |= {tensor.name: name_of(tensor.data_type) for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                types |= _element_types(body)
    return types


def _conv_node(node: Any, types: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> ConvNode:
    onnx = import_extra("onnx", extra="onnx")
    given = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    kernel = tuple(given.get("kernel_shape") or shapes.get(node.input[1], ())[2:])
    rank = len(kernel)
    dilations = tuple(given.get("dilations") or (1,) * rank)
    before = tuple(given.get("pads") or (0,) * 2 * rank)[:rank]
    return ConvNode(
        name=node.name,
        module=torch_module(node),
        input=node.input[0],
        weight=node.input[1],
        output=node.output[0],
        input_type=types.get(node.input[0], "UNDEFINED"),
        weight_type=types.get(node.input[1], "UNDEFINED"),
        weight_shape=shapes.get(node.input[1], ()),
        strides=tuple(given.get("strides") or (1,) * rank),
        group=given.get("group", 1),
        reach=tuple(
            (-pad, (k - 1) * d - pad) for k, d, pad in zip(kernel, dilations, before, strict=True)
        ),
        dilated=any(k > 1 and d > 1 for k, d in zip(kernel, dilations, strict=True)),
    )


def foldable_norms_in_file(model: Any) -> list[str]:
    """The BatchNormalization nodes that a collapse would have folded, by torch module or name.

    Those are the sole readers of a Conv's output.
    """
    convs = {node.output[0] for node in walk(model.graph) if node.op_type == "Conv"}
    readers = _reader_counts(model.graph)
    return [
        torch_module(node) or node.name
        for node in walk(model.graph)
        if node.op_type == "BatchNormalization"
        and node.input[0] in convs
        and readers[node.input[0]] == 1
    ]


def parallel_convs(model: Any, convs: list[ConvNode]) -> list[tuple[ConvNode, ConvNode]]:
    """Pairs of a model's convs that a collapse would have made one: it was forgotten.

    Both read the same tensor, with the same strides and groups; their outputs are only added up;
    and one kernel reaches no further than the other, so that one conv costs less than two.
    """
    readers = _reader_counts(model.graph)
    alone = {conv.output: conv for conv in convs if readers.get(conv.output) == 1}
    sums = {n.output[0]: n for n in walk(model.graph) if n.op_type == "Add"}
    inner = {name for node in sums.values() for name in node.input if readers[name] == 1}
    pairs = []
    for name, node in sums.items():
        if name not in inner:
            terms = [alone[term] for term in _terms(node, sums, readers) if term in alone]
            pairs += [
                (first, second)
                for index, first in enumerate(terms)
                for second in terms[index + 1 :]
                if _would_merge(first, second)
            ]
    return pairs


def _reader_counts(graph: Any) -> dict[str, int]:
    """How often each tensor is read; being an output of the model counts too."""
    counts = {value.name: 1 for value in graph.output}
    for node in walk(graph):
        for name in node.input:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _terms(node: Any, sums: dict[str, Any], readers: dict[str, int]) -> Iterator[str]:
    """The tensors that a tree of Add nodes adds up."""
    for name in node.input:
        if name in sums and readers[name] == 1:
            yield from _terms(sums[name], sums, readers)
        else:
            yield name


def _would_merge(first: ConvNode, second: ConvNode) -> bool:
    same = (first.input, first.strides, first.group) == (second.input, second.strides, second.group)
    # A dilated kernel has gaps that the other one could fall into, so the sum may cost more.
    return (
        same
        and not (first.dilated or second.dilated)
        and (_lies_within(first, second) or _lies_within(second, first))
    )


def _lies_within(inner: ConvNode, outer: ConvNode) -> bool:
    return all(
        low <= first and last <= high
        for (first, last), (low, high) in zip(inner.reach, outer.reach, strict=True)
    )
