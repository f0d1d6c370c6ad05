"""The output of each torch module inside an ONNX file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from orepa_compiler.errors import ExportError
from orepa_compiler.export import export_onnx
from orepa_compiler.export.onnx import writing as exporting
from orepa_compiler.export.run.tapping import boundary_values, onnx_outputs
from tests.export.graphs import POINT, WIDE, add, conv, model, read
from tests.export.nets import images


def test_a_module_is_the_one_tensor_that_others_read() -> None:
    made = model(conv("x", "a", **WIDE), conv("x", "b", **POINT), add("a", "b", "c"))
    values = boundary_values(read(made).graph)
    assert (values["layer.a"], values["layer.b"]) == ("a", "b")
    # Two tensors leave `layer`: which one it returned is unknown.
    assert "layer" not in values


def test_the_values_are_those_of_the_modules(net: nn.Module, exported: dict[str, Path]) -> None:
    found = onnx_outputs(exported["fp32"], [images()])
    seen: dict[str, torch.Tensor] = {}
    for path, child in net.named_modules():
        child.register_forward_hook(lambda m, i, y, path=path: seen.update({path: y}))
    with torch.no_grad():
        net(images())
    assert {"conv1", "block", "block.0", "block.1", "block.2", "fc"} <= found.keys()
    for path in ("block", "block.0", "block.1", "block.2", "fc"):
        assert torch.allclose(found[path], seen[path], atol=1e-5), path


def test_weights_beside_the_file_are_found(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "EMBED_LIMIT_BYTES", 0)
    path = export_onnx(net, images(), tmp_path / "net.onnx")
    assert "block.0" in onnx_outputs(path, [images()])


def test_inputs_that_do_not_fit_are_told(exported: dict[str, Path]) -> None:
    with pytest.raises(ExportError, match=r"fp32.onnx: onnxruntime failed: "):
        onnx_outputs(exported["fp32"], [images()[:, :2]])


def test_a_file_that_cannot_be_loaded_is_told(exported: dict[str, Path], tmp_path: Path) -> None:
    made = onnx.load(exported["fp32"])
    made.graph.node[0].op_type = "Convolve"
    onnx.save(made, tmp_path / "odd.onnx")
    with pytest.raises(ExportError, match=r"onnxruntime cannot load the file: .*Convolve"):
        onnx_outputs(tmp_path / "odd.onnx", [images()])
