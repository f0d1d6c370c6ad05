"""Operators that TensorRT's parser refuses in bfloat16, computed in float32 between two casts.

torch computes them in float32 too and rounds once. Written out as Add, Clip and Mul, a HardSwish in
bfloat16 would round three times.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from orepa_compiler.dependencies import import_extra
from orepa_compiler.export.onnx.inspection import torch_module
from orepa_compiler.export.onnx.precision import lies_in

if TYPE_CHECKING:
    import onnx_ir as ir

# TensorRT for RTX 1.7 refuses these two of 27 activations and reductions that were tried.
REFUSED_IN_BF16 = ("HardSwish", "Mish")


def widen(model: ir.Model, op_types: Collection[str], *, keep: Collection[str] = ()) -> int:
    """Puts a cast to float32 before, and one to bfloat16 behind, every node of these types.

    keep: the torch modules that compute in float32 as they are. Returns how many were widened.
    """
    nodes = [
        node
        for node in model.graph
        if node.op_type in op_types and not lies_in(torch_module(node), keep)
    ]
    for node in nodes:
        _widen_input(model.graph, node)
        _narrow_output(model.graph, node)
    return len(nodes)


def _widen_input(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    cast = _cast(node, source, f"{source.name}_to_{node.name}", "widen", "FLOAT")
    node.replace_input_with(0, cast.outputs[0])
    graph.insert_before(node, cast)


def _narrow_output(graph: ir.Graph, node: ir.Node) -> None:
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    wide = node.outputs[0]
    name = wide.name
    cast = _cast(node, wide, f"{name}_narrow", "narrow", "BFLOAT16")
    narrow = cast.outputs[0]
    # whoever reads the value, an output of the graph too, reads what is cast, by the same name
    wide.replace_all_uses_with(narrow, replace_graph_outputs=True)
    cast.replace_input_with(0, wide)
    wide.name, narrow.name = f"{name}_wide", name
    wide.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.insert_after(node, cast)


def _cast(node: ir.Node, source: ir.Value, name: str, side: str, to: str) -> ir.Node:
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    kind = onnx_ir.DataType[to]
    made = onnx_ir.Value(name=name, shape=source.shape, type=onnx_ir.TensorType(kind))
    return onnx_ir.node(
        "Cast",
        [source],
        {"to": kind.value},
        outputs=[made],
        name=f"{node.name}_{side}",
        metadata_props=dict(node.metadata_props),
    )
