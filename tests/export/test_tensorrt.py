"""Engines are really built, for a GPU that need not be there."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from orepa_compiler.errors import ExportError
from orepa_compiler.export import build_engine, export_onnx
from orepa_compiler.export.gates.network import ParsedNetwork, parse_network
from orepa_compiler.export.tensorrt import engine as building
from orepa_compiler.export.tensorrt.flavors import error_log
from tests.export.nets import images

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_is_built_in_each_precision(
    exported: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    path = build_engine(exported[precision], tmp_path / "net.engine")
    assert path.stat().st_size > 10_000
    assert os.listdir(tmp_path) == ["net.engine"]


@pytest.mark.usefixtures("no_gpu")
def test_an_engine_of_resnet18_holds_its_weights(resnet18: nn.Module, tmp_path: Path) -> None:
    sizes = {}
    for precision in ("fp32", "fp16"):
        source = export_onnx(resnet18, images(1, 64), tmp_path / "net.onnx", precision=precision)
        engine = build_engine(source, tmp_path / "net.engine", compute_capability="8.6")
        sizes[precision] = engine.stat().st_size
    parameters = sum(tensor.numel() for tensor in resnet18.parameters())
    assert 4 * parameters < sizes["fp32"] < 5 * parameters
    assert 2 * parameters < sizes["fp16"] < 3 * parameters


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.1"])
def test_an_engine_is_built_for_a_named_gpu(
    exported: dict[str, Path], tmp_path: Path, capability: str
) -> None:
    build_engine(exported["fp32"], tmp_path / "net.engine", compute_capability=capability)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("capability", ["9.0", "SM89", ""])
def test_an_unknown_gpu_is_refused_with_the_known(
    exported: dict[str, Path], tmp_path: Path, capability: str
) -> None:
    message = r"is not one of 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; 9.0 and 10.0 \(H100.*'trt'"
    with pytest.raises(ExportError, match=message):
        build_engine(exported["fp32"], tmp_path / "net.engine", compute_capability=capability)
    assert os.listdir(tmp_path) == []


def test_the_gpu_at_hand_is_built_for(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ExportError, match=r"compute_capability='9.0' is not one of"):
        build_engine(exported["fp32"], tmp_path / "net.engine", flavor="rtx")


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_and_the_workspace_are_set_as_asked(exported: dict[str, Path], tf32: bool) -> None:
    parsed = parse_network(tensorrt_rtx, exported["fp32"])
    config = building.make_config(tensorrt_rtx, parsed.builder, workspace_gb=0.5, tf32=tf32)
    assert config.get_flag(tensorrt_rtx.BuilderFlag.TF32) is tf32
    assert config.get_memory_pool_limit(tensorrt_rtx.MemoryPoolType.WORKSPACE) == 2**29


@pytest.mark.usefixtures("no_gpu")
def test_no_workspace_at_all_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"workspace_gb=0 leaves no memory"):
        build_engine(exported["fp32"], tmp_path / "net.engine", workspace_gb=0)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("errors", "reason"),
    [(["no kernel", "for this conv"], "no kernel for this conv"), ([], "it gives no reason")],
)
def test_a_failed_build_tells_the_reason_and_leaves_the_old_file(
    exported: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    errors: list[str],
    reason: str,
) -> None:
    def fail(builder: Any, network: Any, config: Any) -> None:
        error_log(tensorrt_rtx).errors.extend(errors)

    def parse(tensorrt: Any, source: Path) -> ParsedNetwork:
        parsed = parse_network(tensorrt, source)
        error_log(tensorrt_rtx).errors.append("said of something else")
        return parsed

    monkeypatch.setattr(building, "parse_network", parse)
    monkeypatch.setattr(tensorrt_rtx.Builder, "build_serialized_network", fail)
    (tmp_path / "net.engine").write_text("old")
    message = rf"fp32.onnx: tensorrt_rtx [\d.]+ could not build the engine: {reason}$"
    with pytest.raises(ExportError, match=message):
        build_engine(exported["fp32"], tmp_path / "net.engine")
    assert os.listdir(tmp_path) == ["net.engine"]
    assert (tmp_path / "net.engine").read_text() == "old"


@pytest.mark.usefixtures("no_gpu")
def test_an_unwritable_path_is_refused_before_the_build(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "parse_network", lambda *_: pytest.fail("the slow part ran"))
    with pytest.raises(ExportError, match=r"cannot write into the folder"):
        build_engine(exported["fp32"], tmp_path / "nowhere" / "net.engine")


@pytest.mark.usefixtures("no_gpu")
def test_the_build_is_quiet_in_a_pipe_and_drawn_on_a_terminal(
    exported: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    build_engine(exported["fp32"], tmp_path / "net.engine")
    assert capfd.readouterr() == ("", "")
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(building, "Console", lambda stderr: terminal)
    build_engine(exported["fp32"], tmp_path / "net.engine")
    assert "Building engine" in screen.getvalue()
