"""int8: what is quantized, how, from which data, and how far it may be off."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from orepa_compiler.errors import ExportError
from orepa_compiler.export import OnnxRunner, export_onnx
from orepa_compiler.export.int8.dithering import with_int8_noise
from orepa_compiler.export.int8.quantization import calibration_batches, check_quantized
from orepa_compiler.export.onnx import writing as exporting
from orepa_compiler.export.onnx.external_data import external_files
from orepa_compiler.export.onnx.inspection import torch_module
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.verification import judge, take_samples
from tests.export.nets import SmallNet, images


@pytest.fixture(scope="module")
def int8(net: SmallNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "net.onnx"
    return export_onnx(net, images(), path, precision="int8", calibration=[images(4), images(3)])


def test_what_multiplies_reads_int8_and_every_node_keeps_its_module(int8: Path) -> None:
    graph = load_graph(int8).graph
    kinds = [node.op_type for node in graph]
    # Three convs and the linear layer: an input and a weight each.
    assert kinds.count("DequantizeLinear") == 8
    assert kinds.count("QuantizeLinear") == 4
    places = {torch_module(n) for n in graph if n.op_type == "DequantizeLinear"}
    # What block.0 reads goes to the residual sum too, in the model's own forward.
    assert places == {"conv1", "", "block.0", "block.2", "fc"}
    properties = load_graph(int8).metadata_props
    assert properties["orepa.precision"] == "int8"
    assert os.listdir(int8.parent) == ["net.onnx"]


def test_weights_have_a_scale_for_each_output_channel_and_biases_stay_float(int8: Path) -> None:
    weights = {tensor.name: tensor for tensor in onnx.load(int8).graph.initializer}
    assert list(weights["conv1.weight_scale"].dims) == [8]
    assert weights["conv1.weight_quantized"].data_type == onnx.TensorProto.INT8
    assert weights["conv1.bias"].data_type == onnx.TensorProto.FLOAT


def test_modules_that_are_kept_are_not_quantized(net: SmallNet, tmp_path: Path) -> None:
    path = export_onnx(
        net,
        images(),
        tmp_path / "net.onnx",
        precision="int8",
        calibration=[images()],
        keep_fp32="block*",
    )
    nodes = load_graph(path).graph
    places = {torch_module(n) for n in nodes if n.op_type == "DequantizeLinear"}
    assert places == {"conv1", "fc"}
    with pytest.raises(ExportError, match=r"^conv1: node .*Conv\): the inputs that are int8 are"):
        check_quantized(path, keep=("conv1",))


def test_the_error_is_that_of_rounding_and_a_wrong_scale_is_seen(
    net: SmallNet, int8: Path, exported: dict[str, Path], tmp_path: Path
) -> None:
    samples = take_samples(net, [images(4)])
    samples = with_int8_noise(samples, exported["fp32"], int8, tmp_path)
    report = judge(samples, OnnxRunner(int8))
    assert report, report
    (row,) = report.rows
    assert row.noise is not None
    assert row.error is not None
    assert 1e-4 < row.noise < 2e-2
    assert row.error < 4 * row.noise
    model = onnx.load(int8)
    scale = next(t for t in model.graph.initializer if t.name == "conv1.weight_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 2, scale.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    assert not judge(samples, OnnxRunner(tmp_path / "wrong.onnx"))


def zero_point(model: onnx.ModelProto) -> None:
    point = next(t for t in model.graph.initializer if t.name == "image_zero_point")
    array = onnx.numpy_helper.to_array(point) + 3
    point.CopyFrom(onnx.numpy_helper.from_array(array.astype("int8"), point.name))


def float_weight(model: onnx.ModelProto) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    conv.input[1] = "conv1.weight_quantized"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (zero_point, "conv1: node .* has a zero point that is not 0, which TensorRT refuses"),
        (float_weight, r"conv1: node .* \[True, False, False\], not \[True, True, False\]"),
    ],
)
def test_what_tensorrt_does_not_take_is_refused(
    int8: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None], said: str
) -> None:
    model = onnx.load(int8)
    change(model)
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match=said):
        check_quantized(tmp_path / "net.onnx")


def test_a_file_without_anything_to_quantize_is_refused(
    exported: dict[str, Path],
) -> None:
    everything = ("conv1", "block", "fc")
    with pytest.raises(ExportError, match=r"nothing to quantize: no Conv, ConvTranspose, Gemm"):
        check_quantized(exported["fp32"], keep=everything)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "int8 needs calibration data, from which the ranges of the values are taken"),
        ([], "int8 needs calibration data"),
        ([images(2, 8)], r"batch 0 holds float32 \(2, 3, 8, 8\), but the model takes float32 \(2,"),
        ([images(), images().double()], r"calibration batch 1 holds float64 \(2, 3, 16, 16\)"),
        ([(images(), images())], r"batch 0 holds float32 .* and float32 .*, but the model takes"),
        (["a"], r"calibration batch 0 holds no tensor \(str\)"),
    ],
)
def test_other_data_than_the_models_inputs_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        calibration_batches(given, (images(),))


def test_a_lone_tensor_is_one_batch_of_any_size() -> None:
    (batch,) = calibration_batches(images(7), (images(2),))  # type: ignore[arg-type]
    assert batch[0].shape[0] == 7


def test_external_weights_stay_external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "EMBED_LIMIT_BYTES", 100)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 32, 3)).eval()
    for precision in ("int8", "fp16"):
        path = export_onnx(
            net, images(), tmp_path / "net.onnx", precision=precision, calibration=[images()]
        )
        (weights,) = external_files(load_graph(path))
        assert sorted(os.listdir(tmp_path)) == sorted(["net.onnx", weights])
        assert (tmp_path / weights).stat().st_size >= 32 * 32 * 9
        kind = torch.float16 if precision == "fp16" else torch.float32
        # As it is written: what a CPU without VNNI makes of int8 products saturates.
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        (output,) = session.run(None, {session.get_inputs()[0].name: images().to(kind).numpy()})
        found = torch.from_numpy(output).float()
        torch.testing.assert_close(found, net(images()), rtol=0.05, atol=0.02)
