"""What is read from ONNX graphs, on graphs made by hand."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.inspection import conv_nodes, foldable_norms_in_file, parallel_convs
from orepa_compiler.export.onnx.reading import load_graph
from tests.export.graphs import POINT, WIDE, add, conv, model, norm, read


def pairs(made: onnx.ModelProto) -> list[tuple[str, str]]:
    model = read(made)
    return [(a.name, b.name) for a, b in parallel_convs(model, conv_nodes(model))]


def test_a_conv_node_is_read_with_its_types_and_its_reach() -> None:
    (node,) = conv_nodes(read(model(conv("x", "a", strides=[2, 2], group=2, **WIDE))))
    assert (node.name, node.module, node.input, node.weight) == ("a", "layer.a", "x", "a.w")
    assert (node.input_type, node.weight_type) == ("FLOAT", "FLOAT")
    assert (node.weight_shape, node.strides, node.group) == ((4, 2, 3, 3), (2, 2), 2)
    assert node.reach == ((-1, 1), (-1, 1))
    assert not node.dilated


def test_a_dilated_conv_reaches_further() -> None:
    attributes = {"kernel_shape": [3, 1], "pads": [2, 0, 2, 0], "dilations": [2, 2]}
    (node,) = conv_nodes(read(model(conv("x", "a", **attributes))))
    assert node.reach == ((-2, 2), (0, 0))
    assert node.dilated


def test_convs_inside_a_branch_body_are_found() -> None:
    body = helper.make_graph(
        [conv("x", "a", **POINT)],
        "then",
        [],
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, None)],
    )
    choice = helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=body)
    made = read(helper.make_model(helper.make_graph([choice], "net", [], [])))
    assert [node.op_type for node in made.graph.all_nodes()] == ["If", "Conv", "Conv"]
    assert [node.name for node in conv_nodes(made)] == ["a", "a"]


def test_a_norm_straight_after_a_conv_is_foldable() -> None:
    made = read(model(conv("x", "a", **WIDE), norm("a", "b")))
    assert foldable_norms_in_file(made) == ["b"]


@pytest.mark.parametrize(
    "made",
    [
        model(norm("x", "a"), conv("a", "b", **WIDE)),
        model(conv("x", "a", **WIDE), helper.make_node("Relu", ["a"], ["r"]), norm("r", "b")),
        model(conv("x", "a", **WIDE), norm("a", "b"), add("a", "b", "c")),
        model(conv("x", "a", **WIDE), norm("a", "b"), outputs=("a", "b")),
    ],
    ids=["before the conv", "after an activation", "the conv is read twice", "it is an output"],
)
def test_other_norms_are_not(made: onnx.ModelProto) -> None:
    assert foldable_norms_in_file(read(made)) == []


def test_parallel_convs_that_are_added_up_are_found() -> None:
    made = model(conv("x", "a", **WIDE), conv("x", "b", **POINT), add("a", "b", "c"))
    assert pairs(made) == [("a", "b")]


def test_they_are_found_in_a_tree_of_sums_each_pair_once() -> None:
    nodes = [conv("x", name, **WIDE) for name in "abc"]
    made = model(*nodes, add("a", "b", "ab"), add("x", "ab", "xab"), add("xab", "c", "sum"))
    assert sorted(pairs(made)) == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    "second",
    [
        conv("x", "b", group=2, **POINT),
        conv("x", "b", strides=[2, 2], **POINT),
        conv("x", "b", kernel_shape=[1, 5], pads=[0, 2, 0, 2]),
        conv("x", "b", dilations=[2, 2], kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
        conv("z", "b", **POINT),
    ],
    ids=[
        "other groups",
        "other strides",
        "neither kernel holds the other",
        "dilated",
        "another input",
    ],
)
def test_convs_that_one_conv_would_not_replace_are_left_alone(second: onnx.NodeProto) -> None:
    relu = helper.make_node("Relu", ["x"], ["z"])
    made = model(relu, conv("x", "a", **WIDE), second, add("a", "b", "c"))
    assert pairs(made) == []


def test_a_conv_that_is_read_elsewhere_is_left_alone() -> None:
    nodes = (conv("x", "a", **WIDE), conv("x", "b", **POINT), add("a", "b", "c"))
    assert pairs(model(*nodes, outputs=("c", "a"))) == []


def test_a_graph_that_contradicts_itself_is_refused() -> None:
    made = model(conv("x", "a", **WIDE))
    false = helper.make_tensor_value_info("a.w", TensorProto.FLOAT, [4, 4, 9, 9])
    made.graph.value_info.append(false)
    with pytest.raises(ExportError, match="the ONNX graph contradicts itself"):
        conv_nodes(read(made))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"none.onnx: no such file; write it with"):
        load_graph(tmp_path / "none.onnx")


def test_a_truncated_file_is_refused_with_its_size(tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    whole = model(conv("x", "a", **WIDE)).SerializeToString()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=rf"not a whole ONNX file \({len(whole) // 2} bytes"):
        load_graph(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.onnx"
    path.touch()
    with pytest.raises(ExportError, match="holds no nodes"):
        load_graph(path)
