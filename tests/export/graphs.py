"""Small ONNX models made by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from orepa_compiler.export.onnx.inspection import MODULE_KEY

WIDE = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
POINT = {"kernel_shape": [1, 1]}


def module_of(node: onnx.NodeProto) -> str | None:
    """The torch module that a node of onnx's own message names."""
    return next((entry.value for entry in node.metadata_props if entry.key == MODULE_KEY), None)


def set_metadata(message: onnx.NodeProto | onnx.ModelProto, entries: dict[str, str]) -> None:
    """Replaces the metadata of one of onnx's own messages."""
    del message.metadata_props[:]
    for key, value in entries.items():
        message.metadata_props.add(key=key, value=value)


def read(made: onnx.ModelProto) -> ir.Model:
    """The model as the package has it in memory."""
    return ir.from_proto(made)


def conv(source: str, output: str, **attributes: object) -> onnx.NodeProto:
    """A Conv node from 4 to 4 channels whose weight is called OUTPUT.w."""
    node = helper.make_node("Conv", [source, f"{output}.w"], [output], output, **attributes)
    node.metadata_props.add(key=MODULE_KEY, value=f"layer.{output}")
    return node


def norm(source: str, output: str) -> onnx.NodeProto:
    names = [source, *(f"bn.{index}" for index in range(4))]
    return helper.make_node("BatchNormalization", names, [output], output)


def add(first: str, second: str, output: str) -> onnx.NodeProto:
    return helper.make_node("Add", [first, second], [output], output)


def model(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ()) -> onnx.ModelProto:
    """A model from x (batch, 4, 8, 8) to `outputs`, by default the last node's."""
    weights = [numpy_helper.from_array(np.ones(4, np.float32), f"bn.{i}") for i in range(4)]
    for node in nodes:
        if node.op_type == "Conv":
            given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            shape = (4, 4 // given.get("group", 1), *given["kernel_shape"])
            weights.append(numpy_helper.from_array(np.ones(shape, np.float32), node.input[1]))
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, "h", "w"])
        for name in ("x", *(outputs or (nodes[-1].output[0],)))
    ]
    graph = helper.make_graph(nodes, "net", infos[:1], infos[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(made, full_check=True)
    return made
