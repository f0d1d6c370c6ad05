"""What TensorRT refuses in bfloat16 computes in float32, between casts of the same module."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from orepa_compiler.errors import ExportError
from orepa_compiler.export import build_engine, export_onnx, inspect_network
from orepa_compiler.export.onnx import writing as exporting
from orepa_compiler.export.onnx.inspection import torch_module
from orepa_compiler.export.onnx.reading import load_graph
from tests.export.nets import images

pytest.importorskip("tensorrt_rtx")

NET = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 4, 3), nn.Hardswish()).eval()


@pytest.mark.usefixtures("no_gpu")
def test_a_hardswish_net_is_built_in_bfloat16(tmp_path: Path) -> None:
    path = export_onnx(NET, images(), tmp_path / "net.onnx", precision="bf16", keep_fp32="3")
    nodes = [(node.op_type, torch_module(node)) for node in load_graph(path).graph]
    assert nodes[:5] == [
        ("Conv", "0"),
        ("Cast", "1"),
        ("HardSwish", "1"),
        ("Cast", "1"),
        ("Conv", "2"),
    ]
    # The kept one has the casts at its borders, and no more.
    assert [kind for kind, _ in nodes[5:]] == ["Cast", "HardSwish", "Cast"]
    assert inspect_network(path).dtypes == (("BF16", 2),)
    assert build_engine(path, tmp_path / "net.engine").stat().st_size > 1_000


@pytest.mark.usefixtures("no_gpu")
def test_without_it_tensorrt_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "REFUSED_IN_BF16", ())
    path = export_onnx(NET, images(), tmp_path / "net.onnx", precision="bf16")
    with pytest.raises(ExportError, match=r"^1: .*cannot parse node .*HardSwish.*precision='fp16'"):
        inspect_network(path)


def test_float16_needs_no_casts(tmp_path: Path) -> None:
    path = export_onnx(NET, images(), tmp_path / "net.onnx", precision="fp16")
    assert "Cast" not in {node.op_type for node in load_graph(path).graph}
