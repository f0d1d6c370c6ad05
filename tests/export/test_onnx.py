"""Exported files: the right numbers, the right form, and a refusal where they would not be."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

import orepa_compiler as orepa
from orepa_compiler.errors import ExportError, MissingPackage, NothingExpandedWarning
from orepa_compiler.export import OnnxRunner, export_onnx
from orepa_compiler.export.onnx import writing as exporting
from orepa_compiler.export.onnx.inspection import conv_nodes, torch_module
from orepa_compiler.export.onnx.reading import load_graph
from tests.export.nets import DictNet, ParallelConvs, Returns, SmallNet, images


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return ((result.double() - truth).abs().max() / truth.abs().max()).item()


def properties(path: Path) -> dict[str, str]:
    return load_graph(path).metadata_props


@pytest.mark.parametrize("batch", [1, 5])
def test_onnxruntime_and_torch_agree_with_float64(
    net: SmallNet, exported: dict[str, Path], batch: int
) -> None:
    x = images(batch)
    truth = copy.deepcopy(net).double()(x.double()).detach()
    assert relative_error(net(x).detach(), truth) < 1e-5
    assert relative_error(OnnxRunner(exported["fp32"])(x), truth) < 1e-5
    half = relative_error(OnnxRunner(exported["fp16"])(x.half()), truth)
    assert 1e-6 < half < 1e-2, "half precision neither exact nor broken"


def test_resnet18_agrees_with_float64(resnet18: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(resnet18, images(1, 64), tmp_path / "resnet18.onnx")
    x = images(2, 64)
    truth = copy.deepcopy(resnet18).double()(x.double()).detach()
    assert relative_error(OnnxRunner(path)(x), truth) < 1e-5
    modules = {conv.module for conv in conv_nodes(load_graph(path))}
    assert len(modules) == 20
    assert {"conv1", "layer1.0.conv2", "layer4.0.downsample.0"} <= modules


@pytest.mark.parametrize(
    ("precision", "element_type", "opset"),
    [("fp32", "FLOAT", 20), ("fp16", "FLOAT16", 20), ("bf16", "BFLOAT16", 22)],
)
def test_a_file_is_valid_and_has_the_precision_asked_for(
    exported: dict[str, Path], precision: str, element_type: str, opset: int
) -> None:
    onnx.checker.check_model(exported[precision], full_check=True)
    graph = load_graph(exported[precision])
    types = {(conv.input_type, conv.weight_type) for conv in conv_nodes(graph)}
    assert types == {(element_type, element_type)}
    assert graph.opset_imports == {"": opset}


def test_every_node_keeps_its_torch_module_and_no_path_of_this_machine(
    net: SmallNet, exported: dict[str, Path]
) -> None:
    graph = load_graph(exported["fp32"])
    found = {node.op_type: torch_module(node) for node in graph.graph}
    assert found["Gemm"] == "fc"
    assert found["Add"] == ""
    assert {c.module for c in conv_nodes(graph)} == {"conv1", "block.0", "block.2"}
    assert {torch_module(node) for node in graph.graph} <= {*dict(net.named_modules())}
    assert str(Path(torch.__file__).parent).encode() not in exported["fp32"].read_bytes()


def test_a_node_that_the_exporter_made_itself_is_placed_too(tmp_path: Path) -> None:
    class Halves(Returns):
        def forward(self, image):  # type: ignore[no-untyped-def]
            first, second = self.conv(image).chunk(2, 1)
            return first - second

    model = nn.Sequential(nn.ReLU(), Halves(None)).eval()
    graph = load_graph(export_onnx(model, images(), tmp_path / "halves.onnx"))
    found = {node.op_type: torch_module(node) for node in graph.graph}
    assert found["Split"] == "1"


def test_the_file_says_where_it_comes_from(exported: dict[str, Path]) -> None:
    found = properties(exported["fp16"])
    assert found.pop("orepa.version")
    assert json.loads(found.pop("orepa.weights")).keys() >= {"conv1.weight", "fc.bias"}
    assert found == {
        "orepa.torch_version": torch.__version__,
        "orepa.precision": "fp16",
        "orepa.keep_fp32": "",
        "orepa.model_dtype": "torch.float32",
        "orepa.convs": "3",
        "orepa.sums": "1",
        "orepa.norms": "0",
        "orepa.outputs": "tensors",
    }


def test_the_batch_is_a_symbol_or_a_number(exported: dict[str, Path], tmp_path: Path) -> None:
    def axes(path: Path) -> list[str | int]:
        graph = onnx.load(path).graph
        dims = (v.type.tensor_type.shape.dim[0] for v in (*graph.input, *graph.output))
        return [dim.dim_param or dim.dim_value for dim in dims]

    assert axes(exported["dict"]) == ["batch"] * 3
    fixed = export_onnx(SmallNet().eval(), images(3), tmp_path / "3.onnx", dynamic_batch=False)
    assert axes(fixed) == [3, 3]


def test_an_output_without_the_batch_is_refused(tmp_path: Path) -> None:
    model = Returns(lambda x, y: {"out": y, "anchors": torch.ones(3)}).eval()
    with pytest.raises(ExportError, match=r"output anchors: its shape \[3\].*dynamic_batch=False"):
        export_onnx(model, images(), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_names_of_outputs_come_before_all_others(tmp_path: Path) -> None:
    model = Returns(lambda x, y: {"image": y, "conv2d": y.relu(), "conv.weight": y * 2}).eval()
    runner = OnnxRunner(export_onnx(model, images(), tmp_path / "net.onnx"))
    found = runner(images())
    assert isinstance(found, dict)
    assert {k: torch.allclose(v, found[k], atol=1e-6) for k, v in model(images()).items()} == {
        "image": True,
        "conv2d": True,
        "conv.weight": True,
    }
    assert [spec.name for spec in runner.inputs] == ["input_image"]


def test_the_users_model_is_not_touched(tmp_path: Path) -> None:
    model = DictNet().eval()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, images(), tmp_path / "net.onnx", precision="bf16")
    after = model.state_dict()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in after
    )
    assert not model.training


def test_light_weights_lie_in_the_file(exported: dict[str, Path]) -> None:
    assert {path.suffix for path in exported["fp32"].parent.iterdir()} == {".onnx"}


def test_heavy_weights_lie_beside_the_graph(
    net: SmallNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "EMBED_LIMIT_BYTES", 100)
    path = export_onnx(net, images(), tmp_path / "net.onnx")
    (data,) = tmp_path.glob("net.onnx.*.data")
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", data.name]
    assert data.name.split(".")[2] == hashlib.sha256(data.read_bytes()).hexdigest()[:16]
    truth = copy.deepcopy(net).double()(images().double()).detach()
    assert relative_error(OnnxRunner(path)(images()), truth) < 1e-5


def test_a_norm_left_behind_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    message = r"^1: a BatchNorm straight after a conv \(1 of them\); call orepa.collapse\(model\)"
    with pytest.raises(ExportError, match=message):
        export_onnx(model, images(), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_a_norm_that_the_collapse_left_is_refused_with_its_reason(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[0].register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ExportError) as caught:
        export_onnx(orepa.collapse(model), images(), tmp_path / "net.onnx")
    assert str(caught.value) == (
        "1: a BatchNorm straight after a conv (1 of them), which orepa.collapse left: 0, which "
        "feeds it, stays: it has a hook, which a rewrite would no longer call; remove the hook "
        "first; change what the reason names, or give the collapse inputs=, and collapse the model "
        "again (orepa.recorded_plans(model)[-1] has all)"
    )


def test_a_model_that_was_expanded_alone_is_told_to_collapse(tmp_path: Path) -> None:
    with pytest.warns(NothingExpandedWarning):
        model = orepa.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), where="none*")
    with pytest.raises(ExportError, match=r"^1: a BatchNorm .* call orepa.collapse\(model\) first"):
        export_onnx(model.eval(), images(), tmp_path / "net.onnx")


def test_a_layer_left_in_train_mode_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).eval()
    model[1].train()
    with pytest.raises(ExportError, match=r"^1: runs as in training \(1 such modules\).*eval\(\)"):
        export_onnx(model, images(), tmp_path / "net.onnx")


def test_parallel_convs_left_behind_are_refused(tmp_path: Path) -> None:
    message = r"^wide: not collapsed: its conv and point's read the same tensor.*\(1 such pairs\)"
    with pytest.raises(ExportError, match=message):
        export_onnx(ParallelConvs().eval(), torch.randn(2, 4, 8, 8), tmp_path / "net.onnx")


def test_a_cast_in_the_forward_that_undoes_the_precision_is_refused(tmp_path: Path) -> None:
    class Upcast(Returns):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            weight = self.conv.weight.float()
            return self.conv(image).float() + functional.conv2d(image.float(), weight)

    message = r"^node_\w+: the conv's input is FLOAT and its weight FLOAT, but FLOAT16 was asked"
    with pytest.raises(ExportError, match=message):
        export_onnx(Upcast(None).eval(), images(), tmp_path / "net.onnx", precision="fp16")


def test_an_operator_that_onnx_lacks_is_refused_by_name(tmp_path: Path) -> None:
    model = Returns(lambda x, y: torch.linalg.svd(y)[0]).eval()
    with pytest.raises(
        ExportError, match=r"torch.onnx.export failed: No ONNX function.*svd.*Change"
    ):
        export_onnx(model, images(), tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, r"int8 needs calibration data"),
        ({"precision": "int4"}, r"precision='int4' is not one of fp32, fp16, bf16, int8"),
        ({"opset": 17}, r"opset=17 is too old for fp32; pass opset=18"),
        ({"opset": 20, "precision": "bf16"}, r"opset=20 is too old for bf16; pass opset=22"),
        ({"opset": 99}, r"the file has operator set \d+, not 99"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    net: SmallNet, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(net, images(), tmp_path / "net.onnx", **options)


def test_the_opset_asked_for_is_the_opset_of_the_file(net: SmallNet, tmp_path: Path) -> None:
    path = export_onnx(net, images(), tmp_path / "net.onnx", opset=18)
    assert load_graph(path).opset_imports == {"": 18}


def test_an_unwritable_path_is_refused_before_the_export(
    net: SmallNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        exporting, "trace_program", lambda *_, **__: pytest.fail("the slow part ran")
    )
    with pytest.raises(ExportError, match=r"cannot write into the folder"):
        export_onnx(net, images(), tmp_path / "nowhere" / "net.onnx")


@pytest.mark.parametrize(
    ("package", "extra"),
    [("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxsim", "simplify"), ("onnxruntime", "cpu")],
)
def test_a_missing_package_is_told_before_the_export(
    net: SmallNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    monkeypatch.setattr(
        exporting, "trace_program", lambda *_, **__: pytest.fail("the slow part ran")
    )
    with pytest.raises(MissingPackage, match=rf"{package};.*orepa-compiler\[{extra}\]"):
        export_onnx(net, images(), tmp_path / "net.onnx", simplify=True)
