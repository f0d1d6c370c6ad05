"""Names and metadata, on graphs made by hand."""

from __future__ import annotations

import onnx_ir as ir
from onnx import TensorProto, helper

from orepa_compiler.export.onnx.annotation import annotate, axes_of, set_properties
from orepa_compiler.export.onnx.inspection import torch_module
from tests.export.graphs import read, set_metadata

SCOPES = "pkg.torch.onnx.name_scopes"
STACK = "pkg.torch.onnx.stack_trace"


def chain(*scopes: str | None) -> ir.Model:
    """x -> Relu -> Relu -> ..., one node for each of `scopes`, as torch's exporter writes them."""
    names = ["x", *(f"v{index}" for index in range(len(scopes)))]
    nodes = []
    for source, output, scope in zip(names, names[1:], scopes, strict=False):
        node = helper.make_node("Relu", [source], [output])
        if scope is not None:
            set_metadata(node, {SCOPES: scope, STACK: "File /home/me/net.py", "namespace": "n"})
        nodes.append(node)
    infos = [
        helper.make_tensor_value_info(names[0], TensorProto.FLOAT, ["s7", 3]),
        helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, ["2*s7", 3, "s77"]),
    ]
    return read(helper.make_model(helper.make_graph(nodes, "net", infos[:1], infos[1:])))


def modules(model: ir.Model) -> list[str | None]:
    return [torch_module(node) for node in model.graph]


def test_the_module_is_the_scope_before_the_node_itself() -> None:
    model = chain("['', 'layer1', 'layer1.0.relu', 'relu_1']", "['', 'add']", "['add']")
    annotate(model, {})
    assert modules(model) == ["layer1.0.relu", "", ""]


def test_the_stack_trace_goes_and_the_rest_stays() -> None:
    model = chain("['', 'add']")
    annotate(model, {})
    assert model.graph[0].metadata_props.keys() == {SCOPES, "namespace", "orepa.module"}


def test_a_node_without_scopes_lies_in_the_module_that_holds_its_readers() -> None:
    model = chain(None, None, "['', 'a', 'a.b', 'a.b.c', 'relu']")
    model.graph.append(ir.node("Relu", model.graph[0].outputs))
    set_properties(model.graph[3], {SCOPES: "['', 'a', 'a.bc', 'relu']"})
    annotate(model, {})
    assert modules(model) == ["a", "a.b.c", "a.b.c", "a.bc"]


def test_a_node_without_scopes_and_readers_has_no_module() -> None:
    model = chain("['', 'a', 'relu']", None)
    annotate(model, {})
    assert modules(model) == ["a", None]


def test_the_symbol_of_the_inputs_is_called_batch_also_in_expressions() -> None:
    model = chain("['', 'add']")
    annotate(model, {})
    shapes = [axes_of(value) for value in (*model.graph.inputs, *model.graph.outputs)]
    assert shapes == [["batch", 3], ["2*batch", 3, "s77"]]


def test_properties_replace_those_before() -> None:
    model = chain("['', 'add']")
    set_properties(model, {"old": "1"})
    annotate(model, {"new": "2"})
    assert model.metadata_props == {"new": "2"}


def test_a_child_of_a_module_with_a_bound_forward_is_named_from_the_root() -> None:
    model = chain("['', 'model.0', 'conv', 'conv2d']", "['', 'model.0', 'head', 'conv2d_1']")
    annotate(model, {}, {"model.0.conv", "model.0.head", "head"})
    assert modules(model) == ["model.0.conv", "head"]
