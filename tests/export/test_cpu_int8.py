"""int8 for CPUs without training: uint8 maps, 7-bit kernels, and operators that run in integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import orepa_compiler as orepa
from orepa_compiler.export.onnx.inspection import torch_module
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.quantization.quantizers import LARGEST
from tests.export.nets import SmallNet, images


def test_its_form_is_that_of_cpus_and_its_outputs_are_near(net: SmallNet, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    options = {"precision": "int8", "calibration": [images(8)], "int8_preset": "cpu"}
    orepa.export_onnx(net, images(), path, **options)  # type: ignore[arg-type]
    model = onnx.load(path)
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
    }
    integers = weights["conv1.weight_quantized"]
    assert integers.dtype == np.int8
    assert 60 <= abs(integers.astype(int)).max() <= LARGEST["cpu"]
    kinds = {weights[n.input[2]].dtype for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert kinds == {np.dtype(np.uint8)}
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["orepa.int8_preset"] == "cpu"
    expected, found = net(images(8)), orepa.OnnxRunner(path)(images(8))
    error = (found - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 0.1


def test_what_is_kept_in_float_has_a_float_kernel(net: SmallNet, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    options = {"precision": "int8", "calibration": [images()], "int8_preset": "cpu"}
    orepa.export_onnx(net, images(), path, keep_fp32="block*", **options)  # type: ignore[arg-type]
    nodes = load_graph(path).graph
    made = {output: node.op_type for node in nodes for output in node.outputs}
    kernels = {
        torch_module(n): made.get(n.inputs[1]) for n in nodes if n.op_type in ("Conv", "Gemm")
    }
    assert kernels["block.0"] is None
    assert kernels["conv1"] == kernels["fc"] == "DequantizeLinear"


def test_mistakes_are_errors(net: SmallNet, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(orepa.ExportError, match="int8_preset='cpu' is for precision='int8', not"):
        orepa.export_onnx(net, images(), path, int8_preset="cpu")
    with pytest.raises(orepa.ExportError, match="int8_preset='npu' is not one of tensorrt, cpu"):
        orepa.export_onnx(
            net, images(), path, precision="int8", calibration=[images()], int8_preset="npu"
        )  # type: ignore[arg-type]
    conv = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    trained = orepa.collapse(orepa.fake_quantize(conv, inputs=images()))
    with pytest.raises(orepa.ExportError, match="trained for int8 on 'tensorrt', not 'cpu'; leave"):
        orepa.export_onnx(trained, images(), path, precision="int8", int8_preset="cpu")
