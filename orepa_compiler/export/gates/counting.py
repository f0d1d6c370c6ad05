"""Convs, sums and norms, counted alike in a traced program, in an ONNX graph and for a network.

A collapse makes the branches of a sum one conv, and folds norms. So a file with more convs, sums of
feature maps, or batch norms, than the collapsed model runs is not that model. Fewer are fine: what
no output reads is left out of a file, and what is computed twice alike is written once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.inspection import input_names, node_outputs
from orepa_compiler.export.onnx.program import CONVS, count_convs, operator_name, program_nodes
from orepa_compiler.export.onnx.reading import inferred

if TYPE_CHECKING:
    import onnx_ir as ir

# Of a feature map: images, channels, and at least one axis of positions. The bias of a linear layer
# is added to two axes, and arithmetic on shapes has one.
MAP_RANK = 3

# Operators that add up two of what they read.
_SUMS = {
    *("aten::add", "aten::add_", "aten::addcmul", "aten::addcmul_", "aten::lerp", "aten::lerp_"),
    *("aten::baddbmm", "aten::addbmm", "aten::hypot", "aten::logaddexp"),
}
# Its mask is added to the product of queries and keys.
_ATTENTION = "aten::scaled_dot_product_attention"
# x + 0.044715 x^3 where it is approximated.
_GELU = "aten::gelu"
# By running statistics; instance_norm too, where it keeps some and its sixth argument is False.
_NORMS = {
    *("aten::batch_norm", "aten::native_batch_norm", "aten::cudnn_batch_norm"),
    *("aten::_native_batch_norm_legit", "aten::_native_batch_norm_legit_no_training"),
}
_INSTANCE_NORM = "aten::instance_norm"
# What torch's exporter writes for each node: the operator of the program that it comes from.
_ORIGIN_KEY = "pkg.torch.onnx.fx_node"
_ORIGIN = re.compile(r"target=torch\.ops\.(\w+)\.(\w+)")
# What a node may come from, to be counted as that which its kind says.
_ORIGINS = {
    "Conv": CONVS | _NORMS,  # a norm that torch's optimizer folded into its conv names the conv
    "Add": _SUMS | {_GELU, _ATTENTION},
    "BatchNormalization": _NORMS | {_INSTANCE_NORM},
}
_KEYS = {"convs": "orepa.convs", "sums": "orepa.sums", "norms": "orepa.norms"}


@dataclass(frozen=True)
class Counts:
    """convs: not transposed. sums: of two feature maps that depend on the input. norms: batch."""

    convs: int
    sums: int
    norms: int

    @classmethod
    def of_program(cls, program: ExportedProgram) -> Counts:
        """Counts what a traced model runs: the most that a file of it may hold."""
        norms = sum(_is_norm(node) for node in program_nodes(program))
        return cls(count_convs(program), _program_sums(program), norms)

    @classmethod
    def of_graph(cls, model: ir.Model, *, translated: bool = False) -> Counts:
        """Counts what an ONNX graph holds.

        translated: without what stands for another operator of torch's program, as the sum in a
        group norm does: what is left is to be compared with that program.
        """
        nodes = [n for n in model.graph.all_nodes() if not (translated and _stands_for_another(n))]
        kinds = [node.op_type for node in nodes]
        sums = _graph_sums(model, [node for node in nodes if node.op_type == "Add"])
        return cls(kinds.count("Conv"), sums, kinds.count("BatchNormalization"))

    @classmethod
    def recorded(cls, properties: dict[str, str]) -> Counts | None:
        """Reads the counts that export_onnx wrote into a file's metadata; None where it did not."""
        if not properties.keys() >= set(_KEYS.values()):
            return None
        return cls(**{name: int(properties[key]) for name, key in _KEYS.items()})

    def __str__(self) -> str:
        return f"{self.convs} convs, {self.sums} sums of maps, {self.norms} norms"

    def properties(self) -> dict[str, str]:
        """Gives the metadata that says so."""
        return {key: str(getattr(self, name)) for name, key in _KEYS.items()}


def node_count(model: ir.Model) -> int:
    """Counts the nodes of a graph, those inside If and Loop bodies included."""
    return sum(1 for _ in model.graph.all_nodes())


def check_counts(found: Counts, wanted: Counts) -> None:
    """Raises ExportError where an ONNX graph holds more than the collapsed model runs."""
    if found.convs > wanted.convs:
        raise ExportError(
            f"the ONNX graph has {found.convs} Conv nodes, but the model runs {wanted.convs} convs"
        )
    if found.sums > wanted.sums:
        raise ExportError(
            f"not collapsed: the ONNX graph adds up feature maps {found.sums} times, and the "
            f"collapsed model {wanted.sums} times; call orepa.collapse(model) and export again"
        )
    if found.norms > wanted.norms:
        raise ExportError(
            f"not collapsed: the ONNX graph has {found.norms} BatchNormalization nodes, and the "
            f"collapsed model {wanted.norms}; call orepa.collapse(model) and export again"
        )


def _is_norm(node: Node) -> bool:
    name = operator_name(node)
    # without running statistics it is an InstanceNormalization in a file, and not told by a count
    return name in _NORMS or (name == _INSTANCE_NORM and node.args[5] is False)


def _stands_for_another(node: ir.Node) -> bool:
    wanted = _ORIGINS.get(node.op_type)
    found = _ORIGIN.search(node.metadata_props.get(_ORIGIN_KEY, ""))
    return bool(wanted and found and f"{found[1]}::{found[2]}" not in wanted)


def _program_sums(program: ExportedProgram) -> int:
    inputs = program.graph_signature.input_specs
    values = {spec.arg.name for spec in inputs if spec.kind is not InputKind.USER_INPUT}
    computed: set[Node] = set()
    count = 0
    for node in program_nodes(program):
        if node.op == "placeholder" and node.name not in values:
            computed.add(node)
        if node.op == "call_function" and computed.intersection(node.all_input_nodes):
            computed.add(node)
            is_map = getattr(node.meta.get("val"), "ndim", 0) >= MAP_RANK
            count += is_map and _adds_up(node, computed)
    return count


def _adds_up(node: Node, computed: set[Node]) -> bool:
    name = operator_name(node)
    if name == _GELU:
        return node.kwargs.get("approximate") == "tanh"
    if name == _ATTENTION:
        return node.kwargs.get("attn_mask", (*node.args, None, None)[3]) in computed
    # Counted by argument: x + x reads one node twice.
    return name in _SUMS and sum(term in computed for term in node.args) > 1


def _graph_sums(model: ir.Model, adds: list[ir.Node]) -> int:
    typed = inferred(model).graph
    values = (*typed.inputs, *(value for node in typed for value in node.outputs))
    small = {value.name for value in values if value.type is not None and _is_no_map(value)}
    computed = {value.name for value in model.graph.inputs} - {*model.graph.initializers}
    for node in model.graph.all_nodes():
        if computed.intersection(input_names(node)):
            computed.update(node_outputs(node))
    return sum(
        not small.intersection(node_outputs(node)) and computed.issuperset(input_names(node))
        for node in adds
    )


def _is_no_map(value: ir.Value) -> bool:
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    types = onnx_ir.DataType
    is_float = value.dtype in (types.FLOAT, types.FLOAT16, types.BFLOAT16, types.DOUBLE)
    is_tensor = isinstance(value.type, onnx_ir.TensorType)
    has_few_axes = value.shape is not None and len(value.shape) < MAP_RANK
    return has_few_axes or not (is_float and is_tensor)
