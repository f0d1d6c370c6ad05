"""The options of orepa-export and orepa bench: what is passed on, and a mistake in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from orepa_compiler.cli import export_main, main
from orepa_compiler.cli.given.engine_options import profile
from orepa_compiler.cli.run import stages
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.latency import Bench, BenchRow, Contents, Timing
from orepa_compiler.export.onnx.inspection import torch_module
from orepa_compiler.export.onnx.reading import load_graph

NETS = """
import torch
import orepa_compiler as orepa
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))

class Hot(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

def hot():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Hot())
    with torch.no_grad():
        net[2][0].weight.mul_(1e6)
        net[2][2].weight.mul_(1e-5)
    return net

def rounding():
    torch.manual_seed(0)
    return orepa.fake_quantize(tiny(), inputs=torch.randn(4, 3, 16, 16))

def batches():
    for _ in range(2):
        yield torch.randn(4, 3, 16, 16)

def nothing():
    return []

def words():
    return ["a"]

def broken():
    raise OSError("no disk")
"""

EXPORT = "nets.py:tiny --input-shape 3x16x16 --onnx net.onnx"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", np.random.default_rng(0).normal(size=(9, 3, 16, 16)))
    np.save(tmp_path / "small.npy", np.zeros((2, 3, 8, 8)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def run(command: Callable[..., int], line: str, capsys: pytest.CaptureFixture[str]) -> tuple:
    code = command(line.split())
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


INT8 = f"{EXPORT} --precision int8"
SHAPES = "--min-shapes 1x3x16x16 --opt-shapes {} --max-shapes {}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (INT8, "--precision int8 takes the ranges of the values from your data: give --calibra"),
        (f"{INT8} --calibration empty", "--calibration empty: this folder holds no .npy or .npz"),
        (f"{INT8} --calibration gone", "--calibration gone: there is no such file or folder"),
        (f"{INT8} --calibration small.npy", "batch 0 holds float32 (2, 3, 8, 8), but the model"),
        (f"{INT8} --calibration nets.py:nothing", "nets.py:nothing: gave no batches"),
        (f"{INT8} --calibration nets.py:words", "nets.py:words: batch 0 holds str; give a tensor"),
        (f"{INT8} --calibration nets.py:broken", "calling broken() raised OSError: no disk"),
        (f"{INT8} --calibration nets.py:batch", "defines no batch; did you mean batches"),
        (
            f"{EXPORT} --precision fp16 --keep-fp32 layer4",
            "keep_fp32: 'layer4' matches none of",
        ),
        (f"{EXPORT} --int8-preset cpu", "--int8-preset: it is for int8; leave it out"),
        (f"{INT8} --int8-preset gpu", "Invalid value for '--int8-preset'"),
        (f"{INT8} --int8-preset cpu --trt n.engine", "--int8-preset cpu: TensorRT refuses its zer"),
        (f"{EXPORT} --trt-flavor tensorrt", "Invalid value for '--trt-flavor'"),
        (f"{EXPORT} --opt-shapes 1x3x16x16", "--min-shapes and --max-shapes: missing; give all"),
        (
            f"{EXPORT} {SHAPES.format('4x3x16x16', '2x3x16x16')}",
            "are (1, 3, 16, 16), (4, 3, 16, 16) and (2, 3, 16, 16); each must be at most the next",
        ),
        (f"{EXPORT} {SHAPES.format('4x3x16x16', 'x')}", "--max-shapes x: write it as sizes"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(export_main, line, capsys)
    assert (code, out, len(err)) == (2, "", 1), err
    assert said in err[0]
    assert not Path("net.onnx").exists()


@pytest.mark.parametrize("source", ["images", "nets.py:batches"])
def test_int8_is_calibrated_checked_and_built(
    source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    shapes = SHAPES.format("2x3x16x16", "4x3x16x16")
    line = f"{INT8} --calibration {source} --trt net.engine --json net.json {shapes}"
    code, _, err = run(export_main, line, capsys)
    assert (code, err) == (0, [])
    assert Path("net.engine").stat().st_size > 1_000
    steps = {step["step"]: step for step in json.loads(Path("net.json").read_text())["steps"]}
    assert steps["check onnx"]["verdict"] == "pass"
    (row, *_) = steps["check onnx"]["report"]["rows"]
    assert 1e-4 < row["noise"] < 0.02
    assert steps["check engine"]["verdict"] == "not run"


def test_the_audit_is_a_step_and_its_advice_helps(capsys: pytest.CaptureFixture[str]) -> None:
    hot = "nets.py:hot --input-shape 3x16x16 --onnx net.onnx --precision fp16"
    code, out, _ = run(export_main, hot, capsys)
    assert code == 3
    assert "keep in float32: --keep-fp32 2" in " ".join(out.split())
    code, _, err = run(export_main, f"{hot} --keep-fp32 2 --json net.json", capsys)
    assert (code, err) == (0, [])
    properties = load_graph(Path("net.onnx")).metadata_props
    assert properties["orepa.keep_fp32"] == "2"
    steps = {step["step"]: step for step in json.loads(Path("net.json").read_text())["steps"]}
    assert steps["audit half"]["audit"]["kept"] == ["2"]


def test_shapes_are_by_name_or_alone() -> None:
    assert profile(None, None, None) is None
    assert profile(["1x3"], ["2x3"], ["4x3"]) == ((1, 3), (2, 3), (4, 3))
    named = profile(["a:1x3", "b:1"], ["a:2x3", "b:2"], ["a:4x3", "b:4"])
    assert named == {"a": ((1, 3), (2, 3), (4, 3)), "b": ((1,), (2,), (4,))}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((["a:1"], ["a:1"], ["b:1"]), "--max-shapes of a: missing; give all three"),
        ((["1", "2"], ["1"], ["1"]), "--min-shapes 2: given twice for the only input"),
        ((["1", "b:1"], ["1", "b:1"], ["1", "b:1"]), "give a name to every input, not to"),
        ((["1x2"], ["1"], ["1"]), "each must be at most the next"),
    ],
)
def test_shapes_that_make_no_profile_are_refused(given: tuple, said: str) -> None:
    with pytest.raises(ReparamError, match=said):
        profile(*given)


def test_a_bench_prints_a_table_and_writes_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(export_main, EXPORT, capsys)[0] == 0
    line = "bench net.onnx --against net.onnx --rounds 6 --batch 2 --json bench.json"
    code, out, err = run(main, line, capsys)
    assert (code, err) == (0, [])
    assert "onnxruntime CPU" in out
    assert "not run: CUDAExecutionProvider" in out
    data = json.loads(Path("bench.json").read_text())
    assert data["batch"] == 2
    verdicts = {row["backend"]: row["verdict"].split(":")[0] for row in data["rows"]}
    assert verdicts["onnxruntime CUDA"] == verdicts["TensorRT"] == "not run"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench net.onnx", "nothing to compare with: give --against STOCK.onnx"),
        ("bench gone.onnx --against gone.onnx", "gone.onnx: there is no such file"),
        ("bench gone.onnx --against b.onnx --rounds 5", "Invalid value for '--rounds'"),
    ],
)
def test_a_mistake_in_a_bench_is_one_line(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(main, line, capsys)
    assert (code, out, len(err)) == (2, "", 1), err
    assert said in err[0]


@pytest.mark.parametrize(
    ("gate", "nodes", "code"), [("--gate", 3, 1), ("--gate", 2, 0), ("", 3, 0)]
)
def test_a_bench_is_a_gate_where_it_is_asked_to_be(
    gate: str, nodes: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing.of([1.0], 1)
    files = (Contents("a", 2, 1, 0, 9), Contents("b", nodes, 1, 0, 9))
    found = Bench(files, (BenchRow("cpu", timing, timing, 1.0, 0.9, 1.1),), 1, 6)
    monkeypatch.setattr("orepa_compiler.export.latency.bench", lambda *_, **__: found)
    for name in ("a.onnx", "b.onnx"):
        Path(name).touch()
    assert main(f"bench a.onnx --against b.onnx {gate}".split()) == code


def rechecked(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict]]:
    code, _, _ = run(main, "verify net.onnx.manifest.json --json again.json", capsys)
    steps = json.loads(Path("again.json").read_text())["steps"]
    return code, {step["step"]: step for step in steps}


def test_an_int8_file_is_checked_again_by_its_samples(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{INT8} --calibration images --json net.json"
    assert run(export_main, line, capsys)[0] == 0
    first = {step["step"]: step for step in json.loads(Path("net.json").read_text())["steps"]}
    code, steps = rechecked(capsys)
    assert code == 0
    assert steps["onnx gates"]["verdict"] == steps["onnx on the CPU"]["verdict"] == "pass"
    # Judged by the noise of int8, which the samples hold, and not by that of float32.
    again, before = (s["report"]["rows"] for s in (steps["onnx on the CPU"], first["check onnx"]))
    assert [row["noise"] for row in again] == [row["noise"] for row in before]
    assert again[0]["error"] > 1e-4
    model = onnx.load("net.onnx")
    name = next(node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    scale.CopyFrom(numpy_helper.from_array(8 * numpy_helper.to_array(scale), name))
    Path("net.onnx").write_bytes(model.SerializeToString())
    code, steps = rechecked(capsys)
    assert code == 1
    assert "has changed since the export" in steps["onnx gates"]["reason"]
    assert steps["onnx on the CPU"]["verdict"] == "mismatch"


@pytest.mark.parametrize(("option", "preset"), [("", "tensorrt"), ("--int8-preset cpu", "cpu")])
def test_the_int8_preset_is_in_the_file_and_beside_it(
    option: str, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{INT8} --calibration images --report net.html {option}"
    assert run(export_main, line, capsys)[0] == 0
    assert load_graph(Path("net.onnx")).metadata_props["orepa.int8_preset"] == preset
    model = onnx.load("net.onnx")
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    rounded = {weights[n.input[2]].dtype for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert rounded == ({np.dtype("uint8")} if preset == "cpu" else {np.dtype("int8")})
    manifest = json.loads(Path("net.onnx.manifest.json").read_text())
    assert manifest["options"]["int8_preset"] == (preset if option else None)
    page = Path("net.html").read_text()
    assert re.search(rf"<dt>int8 preset</dt>\s*<dd>{preset}</dd>", page)
    code, steps = rechecked(capsys)
    assert (code, steps["onnx on the CPU"]["verdict"]) == (0, "pass"), steps


@pytest.mark.parametrize(("preset", "advises"), [("tensorrt", True), ("cpu", False)])
def test_where_a_cpu_computes_otherwise_the_preset_for_cpus_is_named(
    preset: str, advises: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(stages, "OpenVINORunner", lambda path: lambda x: torch.zeros(1))
    line = f"{INT8} --calibration images --openvino net.xml --json net.json --int8-preset {preset}"
    assert run(export_main, line, capsys)[0] == 1
    steps = {step["step"]: step for step in json.loads(Path("net.json").read_text())["steps"]}
    assert steps["check openvino"]["verdict"] == "mismatch"
    said = "its int8 is for TensorRT, and a CPU without VNNI adds such products in 16 bits"
    assert steps["check openvino"]["note"].startswith(said) == advises


def test_what_was_trained_for_int8_may_be_kept_in_float(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{INT8.replace('tiny', 'rounding')} --keep-fp32 3 --json net.json"
    assert run(export_main, line, capsys)[0] == 0
    steps = {step["step"]: step for step in json.loads(Path("net.json").read_text())["steps"]}
    assert steps["check onnx"]["error"] < 1e-5  # beside a model whose maps are not rounded there
    code, _, err = run(export_main, f"{line} --int8-preset cpu", capsys)
    assert code == 3
    assert "the model was trained for int8 on 'tensorrt', not 'cpu'" in " ".join(err)


def test_a_simplified_file_with_its_weights_beside_it_is_checked_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxsim")
    monkeypatch.setattr("orepa_compiler.export.onnx.writing.EMBED_LIMIT_BYTES", 100)
    assert run(export_main, f"{EXPORT} --simplify", capsys)[0] == 0
    (weights,) = Path().glob("net.onnx.*.data")
    modules = [torch_module(n) for n in load_graph(Path("net.onnx")).graph]
    assert modules == ["0", "2", "3"]
    code, steps = rechecked(capsys)
    assert (code, steps["weights file"]["verdict"]) == (0, "pass")
    content = bytearray(weights.read_bytes())
    content[7] ^= 1
    weights.write_bytes(content)
    code, steps = rechecked(capsys)
    assert (code, steps["weights file"]["verdict"]) == (1, "mismatch")
