"""An int8 file of a model that was trained for it: the model's integers, steps and ranges."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.choices import Preset
from orepa_compiler.cli import export_main
from orepa_compiler.export.int8.integers import check_integers, file_layers
from orepa_compiler.export.int8.quantization import check_quantized
from orepa_compiler.export.int8.trained import trained_layers
from orepa_compiler.quantization.quantizers import PRESETS
from tests.quantization.nets import (
    FORMS,
    Net,
    images,
    kernels,
    linear_blocks,
    offline_blocks,
    plain,
    trained,
)

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(orepa.fake_quantize(linear_blocks(), inputs=images()))


@pytest.fixture(scope="module")
def deploy(model: nn.Module) -> nn.Module:
    return orepa.collapse(model, inputs=images())


@pytest.fixture(scope="module")
def file(deploy: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "net.onnx"
    return orepa.export_onnx(deploy, images(), path, precision="int8")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_the_file_holds_the_integers_that_were_trained(
    form: Callable[[], nn.Module], preset: Preset, tmp_path: Path
) -> None:
    model = trained(orepa.fake_quantize(form(), preset=preset, inputs=images()))
    deploy = orepa.collapse(model)
    path = orepa.export_onnx(deploy, images(), tmp_path / "net.onnx", precision="int8")
    before = {path: integers.numpy() for path, integers in kernels(model).items()}
    found = {layer.place: layer.layer for layer in file_layers(path)}
    assert found.keys() == before.keys()
    for place, layer in found.items():
        assert np.array_equal(abs(layer.integers.astype(int)), abs(before[place]))
        assert layer.point.dtype == (np.int8 if preset == "tensorrt" else np.uint8)
    report = orepa.verify(model, path, images(8, seed=7))
    assert report, report
    assert "all 2,622 integers of 5 kernels in net.onnx are the model's" in report.notes
    assert orepa.verify(deploy, path, images(8, seed=7))
    assert orepa.verify(model, deploy, images(8, seed=7))


def test_it_is_in_the_form_that_tensorrt_takes(file: Path) -> None:
    check_quantized(file)
    weights = {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}
    assert weights["stem.0.bias"].data_type == onnx.TensorProto.FLOAT
    assert weights["stem.0.weight_quantized"].data_type == onnx.TensorProto.INT8
    assert "stem.0.weight" not in weights


def change_integer(model: onnx.ModelProto) -> None:
    _change(model, "deep.weight_quantized", lambda values: values ^ np.int8(1))


def change_steps(model: onnx.ModelProto) -> None:
    _change(model, "deep.weight_scale", lambda values: values * np.float32(1.001))


def change_range(model: onnx.ModelProto) -> None:
    _change(model, "input_scale", lambda values: values * np.float32(1.001))


def change_bias(model: onnx.ModelProto) -> None:
    _change(model, "head.1.bias", lambda values: values + np.float32(0.1))


def _change(model: onnx.ModelProto, name: str, function: Callable[[Any], Any]) -> None:
    found = next(t for t in model.graph.initializer if re.fullmatch(rf"(x|{name})", t.name) or (
        name == "input_scale" and t.name == f"{model.graph.input[0].name}_scale"))  # fmt: skip
    values = np.asarray(function(onnx.numpy_helper.to_array(found)))
    found.CopyFrom(onnx.numpy_helper.from_array(values, found.name))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_integer, "deep: .*72 of 72 integers of its kernel are not the trained ones"),
        (change_steps, "deep: .*the steps of its kernel are not the trained ones"),
        (change_range, r"stem\.0: .*its maps have the step .* and were trained with"),
        (change_bias, "output: max error"),
    ],
)
def test_a_file_that_is_not_what_was_trained_fails(
    model: nn.Module, file: Path, tmp_path: Path, change: Change, said: str
) -> None:
    graph = onnx.load(file)
    change(graph)
    path = tmp_path / "net.onnx"
    onnx.save(graph, path)
    report = orepa.verify(model, path, images())
    assert not report
    assert any(
        re.search(said, f"{row.name}: {row.reason}") for row in report.rows if row.reason
    ) or (change is change_bias and report.rows[0].name == "output")


def test_a_file_of_another_model_fails(file: Path) -> None:
    other = trained(orepa.fake_quantize(offline_blocks(), inputs=images()))
    report = orepa.verify(other, file, images())
    assert not report
    assert "integers of its kernel are not the trained ones" in report.verdict


def test_a_file_without_int8_has_none_of_its_integers(model: nn.Module, tmp_path: Path) -> None:
    path = orepa.export_onnx(
        orepa.collapse(orepa.drop_ranges(model)), images(), tmp_path / "f.onnx"
    )
    report = orepa.verify(model, path, images())
    assert not report
    assert "no int8 node of the file comes from it" in report.verdict


def test_what_is_kept_in_float_is_not_quantized(
    model: nn.Module, deploy: nn.Module, tmp_path: Path
) -> None:
    path = orepa.export_onnx(
        deploy, images(), tmp_path / "net.onnx", precision="int8", keep_fp32="head*"
    )
    assert {layer.place for layer in file_layers(path)} == {"stem.0", "body.0", "deep"}
    layers = trained_layers(deploy, keep=["head"])
    assert check_integers(path, layers) == 216 + 576 + 72
    for reference in (model, deploy):  # whose maps are rounded there, and the file's are not
        report = orepa.verify(reference, path, images())
        assert report, report
        assert max(row.error for row in report.rows) < 1e-5


def test_what_is_kept_in_float_is_read_for_openvino_too(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = trained(orepa.fake_quantize(linear_blocks(), preset="cpu", inputs=images()))
    path = tmp_path / "net.onnx"
    orepa.export_onnx(orepa.collapse(model), images(), path, precision="int8", keep_fp32="head*")
    own = orepa.write_openvino(path, tmp_path / "net.xml")
    assert orepa.OpenVINORunner(own).properties["orepa.keep_fp32"] == "head"
    for candidate in (f"{path}@openvino", orepa.OnnxRunner(path), own):
        report = orepa.verify(model, candidate, images())
        assert report, report
    graph = onnx.load(path)
    change_steps(graph)
    onnx.save(graph, path)
    report = orepa.verify(model, f"{path}@openvino", images())
    assert "the steps of its kernel are not the trained ones" in report.verdict


def test_a_layer_that_was_left_in_float_stays_so(tmp_path: Path) -> None:
    model = orepa.fake_quantize(plain(), where=["!deep"], inputs=images())
    path = tmp_path / "net.onnx"
    orepa.export_onnx(orepa.collapse(model), images(), path, precision="int8")
    assert {layer.place for layer in file_layers(path)} == {"stem.0", "body.0", "head.1", "head.3"}
    assert orepa.verify(model, path, images())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp16"}, "trained to round to int8; pass precision='int8' and not 'fp16'"),
        ({}, "was trained to round to int8; pass precision='int8' and not 'fp32', or orepa.drop"),
        ({"precision": "int8", "calibration": [images()]}, "calibration= would give it others"),
    ],
)
def test_another_wish_beside_the_trained_ranges_is_an_error(
    deploy: nn.Module, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(orepa.ExportError, match=said):
        orepa.export_onnx(deploy, images(), tmp_path / "net.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_maps_without_a_range_are_not_exported(tmp_path: Path) -> None:
    deploy = orepa.collapse(orepa.fake_quantize(plain()))
    with pytest.raises(
        orepa.ExportError, match=r"^stem\.0: the maps that go into it have no range"
    ):
        orepa.export_onnx(deploy, images(), tmp_path / "net.onnx", precision="int8")


class Unused(Net):
    """A net with a conv that its forward does not run."""

    runs_it = True

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.runs_it:
            self.extra(self.stem(x))
        return super().forward(x)


def test_a_layer_that_the_file_does_not_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Unused().eval()
    deploy = orepa.collapse(orepa.fake_quantize(net, inputs=images()))
    said = r"^extra: it was trained to round .* comes from it"
    monkeypatch.setattr(Unused, "runs_it", False)
    with pytest.raises(orepa.ExportError, match=said):
        orepa.export_onnx(deploy, images(), tmp_path / "net.onnx", precision="int8")


def test_verify_takes_no_other_truth(model: nn.Module, file: Path) -> None:
    with pytest.raises(orepa.ReparamError, match="the reference rounds to int8: it is its own tru"):
        orepa.verify(model, file, images(), precision="fp16")


def test_a_model_that_rounds_is_not_certified(model: nn.Module, deploy: nn.Module) -> None:
    with pytest.raises(orepa.ReparamError, match="and certify works on a model that does not"):
        orepa.certify(model, deploy, images())


def test_the_command_needs_no_calibration(model: nn.Module, tmp_path: Path) -> None:
    checkpoint = orepa.save(model, tmp_path / "net.safetensors")
    arguments = ["tests/quantization/nets.py:Net", "--checkpoint", str(checkpoint)]
    arguments += ["--onnx", str(tmp_path / "net.onnx"), "--input-shape", "3x12x12"]
    report = tmp_path / "net.json"
    assert export_main([*arguments, "--precision", "int8", "--json", str(report)]) == 0
    assert "its integers are compared with the file's, one by one" in report.read_text()
    assert len(list(file_layers(tmp_path / "net.onnx"))) == 5
