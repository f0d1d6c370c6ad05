"""Each gate on an exported file is seen to pass it, and to refuse one that was tampered with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from orepa_compiler.errors import ExportError
from orepa_compiler.export.gates.artifact import Expected, check_artifact
from orepa_compiler.export.gates.counting import Counts
from orepa_compiler.export.onnx.inspection import MODULE_KEY
from orepa_compiler.export.onnx.program import trace_program
from tests.export.graphs import set_metadata
from tests.export.nets import SmallNet, images

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def expected(net: SmallNet) -> Expected:
    program = trace_program(net, (images(),), dynamic_batch=True)
    return Expected.of(net, program, element_type="FLOAT", dynamic_batch=True, opset=20)


def tampered(source: Path, folder: Path, change: Change) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, folder / "tampered.onnx")
    return folder / "tampered.onnx"


def test_what_was_exported_is_what_was_expected(
    exported: dict[str, Path], expected: Expected
) -> None:
    assert (expected.counts, expected.outputs) == (Counts(3, 1, 0), ("output",))
    assert expected.modules["block.0"] == (8, 4, 3, 3)
    assert expected.modules["fc"] is None
    check_artifact(exported["fp32"], expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"counts": Counts(2, 1, 0)},
            r"the ONNX graph has 3 Conv nodes, but the model runs 2 convs",
        ),
        ({"outputs": ("logits",)}, r"the file returns output, but the model logits"),
        ({"opset": 21}, r"the file has operator set 20, not 21; pass opset=20 or none"),
        ({"element_type": "FLOAT16"}, r"^conv1: the conv's input is FLOAT.*FLOAT16 was asked"),
        ({"modules": {"conv1": (8, 3, 3, 3)}}, r"names the torch module 'block.0'"),
        (
            {"modules": {"conv1": (1, 3, 3, 3)}},
            r"'conv1' \(weight \(1, 3, 3, 3\)\).*\(8, 3, 3, 3\)",
        ),
    ],
)
def test_another_file_than_expected_is_refused(
    exported: dict[str, Path], expected: Expected, wrong: dict, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        check_artifact(exported["fp32"], replace(expected, **wrong))


def fix_input_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def fix_output_batch(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2


def drop_module(model: onnx.ModelProto) -> None:
    set_metadata(model.graph.node[0], {})


def misplace_module(model: onnx.ModelProto) -> None:
    set_metadata(model.graph.node[0], {MODULE_KEY: "block.2"})


def read_a_missing_tensor(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[0] = "nothing"


def mix_types(model: onnx.ModelProto) -> None:
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.weight")
    weight.data_type = onnx.TensorProto.INT32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fix_input_batch, r"input image: its first axis is 2, not the symbol batch"),
        (fix_output_batch, r"output output: its shape \[2, 5\] does not depend on the batch size"),
        (drop_module, r"node \w+ names the torch module None"),
        (misplace_module, r"'block.2' \(weight \(8, 8, 1, 1\)\).*does not fit.*\(8, 3, 3, 3\)"),
        (read_a_missing_tensor, r"onnx.checker refuses the exported file: .*nothing"),
        (mix_types, r"onnx.checker refuses the exported file|the ONNX graph contradicts itself"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(
    exported: dict[str, Path], expected: Expected, tmp_path: Path, change: Change, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        check_artifact(tampered(exported["fp32"], tmp_path, change), expected)


def test_a_fixed_batch_is_fine_where_it_was_asked_for(
    exported: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    path = tampered(exported["fp32"], tmp_path, fix_input_batch)
    check_artifact(path, replace(expected, dynamic_batch=False))


def test_a_norm_in_the_file_is_refused(
    exported: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    def insert_norm(model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        first = nodes[0]
        bias = first.input[2]
        norm = onnx.helper.make_node(
            "BatchNormalization", ["raw", bias, bias, bias, bias], [first.output[0]], "bn"
        )
        first.output[0] = "raw"
        del model.graph.node[:]
        model.graph.node.extend([first, norm, *nodes[1:]])

    path = tampered(exported["fp32"], tmp_path, insert_norm)
    with pytest.raises(ExportError, match=r"^bn: not collapsed: a BatchNormalization straight"):
        check_artifact(path, expected)
