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
from orepa_compiler.export import tensorrt as building
from orepa_compiler.export.flavors import error_log
from orepa_compiler.export.network import ParsedNetwork, parse_network
from tests.export.graphs import WIDE, conv, model
from tests.export.nets import images
from tests.export.test_network import saved

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
    message = r"is not one of 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; 9.0 and 10.0 \(H100.*'tensorrt'"
    with pytest.raises(ExportError, match=message):
        build_engine(exported["fp32"], tmp_path / "net.engine", compute_capability=capability)
    assert os.listdir(tmp_path) == []


def test_the_gpu_at_hand_is_built_for(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ExportError, match=r"compute_capability='9.0' is not one of"):
        build_engine(exported["fp32"], tmp_path / "net.engine", flavor="tensorrt_rtx")


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


IMAGE = (-1, 3, 16, 16)


def test_a_symbolic_batch_gets_the_default_range() -> None:
    assert building.shape_range("x", IMAGE, None) == [(b, 3, 16, 16) for b in (1, 8, 32)]


def test_shapes_that_fit_are_taken() -> None:
    shapes = [(2, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16)]
    assert building.shape_range("x", IMAGE, shapes) == shapes


@pytest.mark.parametrize(
    "batches", [(1, 2), (1, 2, 3, 4), (2, 1, 3), (1, 4, 3), (0, 1, 2)], ids=str
)
def test_other_than_three_rising_shapes_are_refused(batches: tuple[int, ...]) -> None:
    with pytest.raises(ExportError, match=r"shapes of input x are.*three rising shapes that fit"):
        building.shape_range("x", IMAGE, [(batch, 3, 16, 16) for batch in batches])


@pytest.mark.parametrize("shape", [(1, 3, 16, 17), (1, 3, 16)], ids=str)
def test_shapes_that_do_not_fit_the_input_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ExportError, match=r"pass three rising shapes that fit \(-1, 3, 16, 16\)"):
        building.shape_range("x", IMAGE, [shape] * 3)


def test_further_symbolic_axes_need_shapes() -> None:
    with pytest.raises(ExportError, match=r"input x has symbolic axes beside the batch.*shapes="):
        building.shape_range("x", (-1, 3, -1, -1), None)


@pytest.mark.usefixtures("no_gpu")
def test_shapes_of_an_unknown_input_are_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    message = r"shapes names \['x'\], but the inputs with symbolic axes are \['image'\]"
    with pytest.raises(ExportError, match=message):
        build_engine(exported["fp32"], tmp_path / "net.engine", shapes={"x": [IMAGE] * 3})


class Config:
    """Takes a profile, or refuses it."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.profiles: list[Any] = []
        self.refuses = refuses

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return -1 if self.refuses else 0


@pytest.mark.usefixtures("no_gpu")
def test_given_shapes_reach_the_profile(tmp_path: Path) -> None:
    source = saved(model(conv("x", "a", kernel_shape=[3, 3])), tmp_path)
    shapes = [(1, 4, 9, 9), (1, 4, 16, 16), (3, 4, 32, 16)]
    parsed, config = parse_network(tensorrt_rtx, source), Config()
    building.set_shapes(parsed, config, {"x": shapes})
    (profile,) = config.profiles
    assert [tuple(shape) for shape in profile.get_shape("x")] == shapes
    build_engine(source, tmp_path / "net.engine", shapes={"x": shapes})


def test_a_refused_profile_is_told(exported: dict[str, Path]) -> None:
    parsed = parse_network(tensorrt_rtx, exported["fp32"])
    with pytest.raises(ExportError, match=r"TensorRT refuses the shapes .*image"):
        building.set_shapes(parsed, Config(refuses=True), {})


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
def test_a_file_without_symbolic_axes_needs_no_shapes(tmp_path: Path) -> None:
    made = model(conv("x", "a", **WIDE))
    for value in (made.graph.input[0], made.graph.output[0]):
        for dim, size in zip(value.type.tensor_type.shape.dim, (2, 4, 8, 8), strict=True):
            dim.dim_value = size
    source = saved(made, tmp_path)
    build_engine(source, tmp_path / "net.engine")
    with pytest.raises(ExportError, match=r"the inputs with symbolic axes are none"):
        build_engine(source, tmp_path / "net.engine", shapes={"x": [(2, 4, 8, 8)] * 3})


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
