"""Operators that TensorRT's parser refuses in bfloat16, computed in float32 between two casts.

torch computes them in float32 too and rounds once. Written out as Add, Clip and Mul, a HardSwish in
bfloat16 would round three times.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from orepa_compiler.dependencies import import_extra
from orepa_compiler.export.onnx.annotation import set_properties
from orepa_compiler.export.onnx.inspection import torch_module
from orepa_compiler.export.onnx.precision import lies_in

# TensorRT for RTX 1.7 refuses these two of 27 activations and reductions that were tried.
REFUSED_IN_BF16 = ("HardSwish", "Mish")


def widen(model: Any, op_types: Collection[str], *, keep: Collection[str] = ()) -> int:
    """Puts a cast to float32 before, and one to bfloat16 behind, every node of these types.

    keep: the torch modules that compute in float32 as they are. Returns how many were widened.
    """
    onnx = import_extra("onnx", extra="onnx")
    nodes, count = [], 0
    for node in model.graph.node:
        if node.op_type not in op_types or lies_in(torch_module(node), keep):
            nodes.append(node)
            continue
        count += 1
        source, target = node.input[0], node.output[0]
        node.input[0], node.output[0] = f"{source}_to_{node.name}", f"{target}_wide"
        casts = [
            onnx.helper.make_node("Cast", [given], [made], f"{node.name}_{side}", to=to)
            for given, made, side, to in (
                (source, node.input[0], "widen", onnx.TensorProto.FLOAT),
                (node.output[0], target, "narrow", onnx.TensorProto.BFLOAT16),
            )
        ]
        for cast in casts:
            set_properties(cast, {entry.key: entry.value for entry in node.metadata_props})
        nodes += [casts[0], node, casts[1]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return count
