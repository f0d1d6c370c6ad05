"""Looks into an ONNX graph: its convs, their types, and the marks of a forgotten collapse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.reading import inferred

if TYPE_CHECKING:
    import onnx_ir as ir

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
        """Names the torch module where it is known, else the node."""
        return self.module or self.name or self.output


def torch_module(node: ir.Node) -> str | None:
    """Reads which torch module a node comes from; None where the file does not say."""
    return node.metadata_props.get(MODULE_KEY)


def input_names(node: ir.Node) -> list[str]:
    """Names what a node reads; "" for an optional input that is left out."""
    return ["" if value is None else value.name or "" for value in node.inputs]


def node_outputs(node: ir.Node) -> list[str]:
    """Names what a node makes."""
    return value_names(node.outputs)


def value_names(values: Iterable[ir.Value]) -> list[str]:
    """Names values: the inputs and outputs of a graph, for one."""
    return [value.name or "" for value in values]


def conv_nodes(model: ir.Model) -> list[ConvNode]:
    """Lists the Conv nodes of a model, in its order, with the element types that ONNX infers.

    Raises ExportError where the types contradict each other.
    """
    nodes = inferred(model).graph.all_nodes()
    return [_conv_node(node) for node in nodes if node.op_type == "Conv"]


def _conv_node(node: ir.Node) -> ConvNode:
    source, weight = (*node.inputs, None, None)[:2]
    if source is None or weight is None or not node.outputs:
        raise ExportError(f"node {node.name}: a Conv without input, weight or output")
    shape = _weight_shape(weight)
    kernel = ints_of(node, "kernel_shape") or shape[2:]
    rank = len(kernel)
    dilations = ints_of(node, "dilations") or (1,) * rank
    before = (ints_of(node, "pads") or (0,) * 2 * rank)[:rank]
    if not len(dilations) == len(before) == rank:
        raise ExportError(
            f"node {node.name}: a Conv of {rank} axes with dilations {dilations} and pads {before}"
        )
    return ConvNode(
        name=node.name or "",
        module=torch_module(node),
        input=source.name or "",
        weight=weight.name or "",
        output=node.outputs[0].name or "",
        input_type=_element_type(source),
        weight_type=_element_type(weight),
        weight_shape=shape,
        strides=ints_of(node, "strides") or (1,) * rank,
        group=next(iter(ints_of(node, "group")), 1),
        reach=tuple(
            (-pad, (k - 1) * d - pad) for k, d, pad in zip(kernel, dilations, before, strict=True)
        ),
        dilated=any(k > 1 and d > 1 for k, d in zip(kernel, dilations, strict=True)),
    )


def ints_of(node: ir.Node, name: str) -> tuple[int, ...]:
    """Reads the integers of an attribute; none where there are none, or values of another type."""
    held = node.attributes[name].value if name in node.attributes else ()
    given = tuple(held) if isinstance(held, (tuple, list)) else (held,)
    return tuple(number for number in given if isinstance(number, int))


def _weight_shape(value: ir.Value) -> tuple[int, ...]:
    """Gives the shape of a weight of the file; () for one that a node makes."""
    tensor = value.const_value if value.is_initializer() else None
    return () if tensor is None else tuple(int(size) for size in tensor.shape.numpy())


def _element_type(value: ir.Value) -> str:
    if value.is_initializer() and value.const_value is not None:
        return value.const_value.dtype.name
    return "UNDEFINED" if value.dtype is None else value.dtype.name


def foldable_norms_in_file(model: ir.Model) -> list[str]:
    """Names the BatchNormalization nodes that a collapse would have folded, by module or node.

    Those are the sole readers of a Conv's output.
    """
    return [
        torch_module(node) or node.name or ""
        for node in model.graph.all_nodes()
        if node.op_type == "BatchNormalization" and _is_alone_behind_a_conv(node)
    ]


def _is_alone_behind_a_conv(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    conv = source.producer() if source is not None else None
    if source is None or conv is None or conv.op_type != "Conv":
        return False
    return source is conv.outputs[0] and _readers(source) == 1


def parallel_convs(model: ir.Model, convs: list[ConvNode]) -> list[tuple[ConvNode, ConvNode]]:
    """Pairs those of a model's convs that a collapse would have made one: it was forgotten.

    Both read the same tensor, with the same strides and groups; their outputs are only added up;
    and one kernel reaches no further than the other, so that one conv costs less than two.
    """
    known = {conv.output: conv for conv in convs}
    pairs = []
    for node in model.graph.all_nodes():
        if node.op_type == "Add" and node.outputs and not _is_inner(node.outputs[0]):
            values = [value for value in _terms(node) if _readers(value) == 1]
            terms = [known[name] for name in (value.name for value in values) if name in known]
            pairs += [
                (first, second)
                for index, first in enumerate(terms)
                for second in terms[index + 1 :]
                if _would_merge(first, second)
            ]
    return pairs


def _readers(value: ir.Value) -> int:
    """Counts how often a tensor is read; being an output of the model counts too."""
    return len(value.uses()) + value.is_graph_output()


def _is_inner(total: ir.Value) -> bool:
    """Whether a sum is only a term of another one."""
    return _readers(total) == 1 and any(use.node.op_type == "Add" for use in total.uses())


def _terms(node: ir.Node) -> Iterator[ir.Value]:
    """Yields the tensors that a tree of Add nodes adds up."""
    for value in node.inputs:
        if value is None:
            continue
        maker = value.producer()
        if maker is not None and maker.op_type == "Add" and _readers(value) == 1:
            yield from _terms(maker)
        else:
            yield value


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
