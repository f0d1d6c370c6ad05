"""What TensorRT parses, and the gates that stand before a build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from orepa_compiler.errors import ExportError
from orepa_compiler.export import NetworkSummary, inspect_network
from orepa_compiler.export.gates.network import check_network, parse_error, parse_network
from orepa_compiler.export.onnx.reading import load_graph
from tests.export.graphs import POINT, WIDE, add, conv, model, norm

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")

pytestmark = pytest.mark.usefixtures("no_gpu")


def saved(made: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(made, folder / "made.onnx")
    return folder / "made.onnx"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "FLOAT"), ("fp16", "HALF"), ("bf16", "BF16")]
)
def test_the_network_has_the_convs_and_the_precision_of_the_file(
    exported: dict[str, Path], precision: str, dtype: str
) -> None:
    summary = inspect_network(exported[precision])
    # The residual sum; the bias of the linear layer is no feature map.
    assert (summary.convs, summary.adds, summary.norms) == (3, 1, 0)
    assert summary.dtypes == ((dtype, 3),)
    assert str(summary).startswith(f"3 convs (3 in {dtype}), 1 adds, 0 norms, ")


def test_norms_that_stay_are_counted(tmp_path: Path) -> None:
    made = model(norm("x", "a"), conv("a", "b", **WIDE))
    assert inspect_network(saved(made, tmp_path)).norms == 1


def test_a_sum_counts_where_both_sides_are_feature_maps(tmp_path: Path) -> None:
    # A sum of maps, one with a constant, and one of vectors.
    made = model(
        add("x", "x", "a"),
        add("a", "bn.0", "b"),
        helper.make_node("GlobalAveragePool", ["b"], ["p"]),
        helper.make_node("Flatten", ["p"], ["v"]),
        add("v", "v", "w"),
        outputs=("b",),
    )
    vector = helper.make_tensor_value_info("w", TensorProto.FLOAT, ["batch", 4])
    made.graph.output.append(vector)
    made.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 4
    assert inspect_network(saved(made, tmp_path)).adds == 1


def test_a_file_that_is_not_collapsed_is_refused(tmp_path: Path) -> None:
    parallel = model(conv("x", "a", **WIDE), conv("x", "b", **POINT), add("a", "b", "c"))
    message = r"^layer.a: not collapsed: its conv and layer.b's read the same tensor.*collapse"
    with pytest.raises(ExportError, match=message):
        inspect_network(saved(parallel, tmp_path))
    normed = model(conv("x", "a", **WIDE), norm("a", "b"))
    with pytest.raises(
        ExportError, match=r"^b: not collapsed: a BatchNormalization straight after"
    ):
        inspect_network(saved(normed, tmp_path))


def test_a_network_with_other_convs_than_the_file_is_refused(exported: dict[str, Path]) -> None:
    source = exported["fp16"]
    graph, summary = load_graph(source), inspect_network(source)
    check_network(summary, source, graph)
    with pytest.raises(ExportError, match=r"has 3 Conv nodes, but TensorRT's network 4"):
        check_network(replace(summary, convs=4), source, graph)
    for other in (replace(summary, adds=2), replace(summary, norms=1)):
        with pytest.raises(
            ExportError, match=r"has 1 sums of feature maps and 0 norms, but.*not c"
        ):
            check_network(other, source, graph)
    message = r"convs read \{'HALF': 3\}, but those of TensorRT's network \{'FLOAT': 3\}"
    with pytest.raises(ExportError, match=message):
        check_network(replace(summary, dtypes=(("FLOAT", 3),)), source, graph)


def test_an_operator_without_a_kernel_is_refused_with_its_module_and_a_hint(
    tmp_path: Path,
) -> None:
    infos = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1, 4]) for name in "xy"]
    node = helper.make_node("HardSwish", ["x"], ["y"], "swish")
    node.metadata_props.add(key="orepa.module", value="features.0.act")
    made = helper.make_model(
        helper.make_graph([node], "net", infos[:1], infos[1:]),
        opset_imports=[helper.make_opsetid("", 22)],
    )
    message = (
        r"^features.0.act: .*cannot parse node swish \(HardSwish\): .*Only FLOAT, HALF.*"
        r"\(1 such errors\). Export with precision='fp16' or 'fp32'$"
    )
    with pytest.raises(ExportError, match=message):
        inspect_network(saved(made, tmp_path))


def test_an_unknown_operator_is_refused_with_what_to_do(tmp_path: Path) -> None:
    made = model(conv("x", "a", **WIDE), helper.make_node("Relu", ["a"], ["b"], "odd"))
    made.graph.node[1].op_type, made.graph.node[1].domain = "Odd", "mine"
    made.opset_import.append(helper.make_opsetid("mine", 1))
    message = r"node odd \(Odd\): .*Plugin not found.*TensorRT does not know this operator"
    with pytest.raises(ExportError, match=message):
        inspect_network(saved(made, tmp_path))


def test_a_parser_that_says_nothing_is_reported_as_such(exported: dict[str, Path]) -> None:
    error = parse_error(SimpleNamespace(num_errors=0), exported["fp32"], None)
    assert str(error).endswith("TensorRT cannot parse the file and gives no reason")


def test_a_truncated_file_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(exported["fp32"].read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"cut.onnx: not a whole ONNX file \(1000 bytes"):
        inspect_network(tmp_path / "cut.onnx")


def test_a_tensorrt_that_cannot_start_is_told(exported: dict[str, Path]) -> None:
    class NoDriver(SimpleNamespace):
        __hash__ = object.__hash__

    def fail(log: object) -> None:
        raise TypeError("factory function returned nullptr")

    tensorrt = NoDriver(
        Builder=fail, ILogger=tensorrt_rtx.ILogger, __name__="tensorrt", __version__="11.0"
    )
    with pytest.raises(ExportError, match=r"tensorrt 11.0 cannot start here: factory function"):
        parse_network(tensorrt, exported["fp32"])  # type: ignore[arg-type]


def test_a_summary_without_convs_can_be_printed() -> None:
    assert str(NetworkSummary(2, 0, 1, 0, ())) == "0 convs (none), 1 adds, 0 norms, 2 layers"
