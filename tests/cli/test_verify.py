"""`orepa verify` on real files: two sides of every kind, the user's data, and manifests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from orepa_compiler.cli import export_main, main
from orepa_compiler.cli.run.named_sides import load_side

NETS = """
import torch
from torch import nn

def make(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6))
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return net

def tiny():
    return make(0)

def other():
    return make(1)

class Leaky(nn.Module):
    def forward(self, x):
        return nn.functional.leaky_relu(x)

def leaky():
    net = make(0)
    net[2] = Leaky()
    return net
"""

SHAPE = "--input-shape 3x8x8"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nets.py, an export of `tiny` with its engine, and the user's data."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        Path("nets.py").write_text(NETS)
        rows = np.random.default_rng(0).normal(size=(5, 3, 8, 8))
        np.save("images.npy", rows)
        line = f"nets.py:tiny --onnx net.onnx --trt net.engine {SHAPE} --inputs images.npy"
        assert export_main([*line.split(), "--json", "export.json", "--junit", "export.xml"]) == 0
    return folder


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder."""
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return copy


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    code = main(line.split())
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def test_an_export_leaves_all_that_a_later_check_needs() -> None:
    names = {path.name for path in Path.cwd().iterdir()} - {"__pycache__"}
    assert names == {
        *("nets.py", "images.npy", "net.onnx", "net.engine", "export.json", "export.xml"),
        *("net.onnx.manifest.json", "net.onnx.samples.safetensors"),
    }
    steps = {step["step"]: step for step in json.loads(Path("export.json").read_text())["steps"]}
    assert steps["certify collapse"]["certificate"]["ok"]
    assert len(steps["check onnx"]["report"]["rows"]) == 3 + 4  # 5 images by 2, and 4 made inputs
    (suite,) = ElementTree.parse("export.xml").getroot()
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("0", "0", "1")


@pytest.mark.parametrize(
    ("sides", "code"),
    [
        ("nets.py:tiny nets.py:tiny@collapsed", 0),
        ("nets.py:tiny net.onnx", 0),
        ("nets.py:tiny@collapsed net.onnx@cpu", 0),
        ("net.onnx net.onnx", 0),
        ("nets.py:other net.onnx", 1),
        ("nets.py:leaky@collapsed nets.py:tiny", 1),
    ],
)
def test_any_two_sides(sides: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    found, out, err = run(f"verify {sides} --inputs images.npy", capsys)
    assert (found, err) == (code, [])
    assert out.startswith("FAIL" if code else "PASS")


def test_a_collapsed_side_is_collapsed() -> None:
    inputs = (torch.zeros(1, 3, 8, 8),)
    for source, norms in (("nets.py:tiny", 2), ("nets.py:tiny@collapsed", 0)):
        model = load_side(source, None, inputs=inputs, allow_pickle=False)
        assert isinstance(model, nn.Module)
        assert sum(isinstance(child, nn.BatchNorm2d) for child in model.modules()) == norms


@pytest.mark.parametrize("side", ["net.onnx@cuda", "net.engine"])
def test_what_needs_a_gpu_is_not_run(side: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, (line,) = run(f"verify nets.py:tiny {side} {SHAPE}", capsys)
    assert code == 4
    assert "CUDAExecutionProvider is not in" in line or "device numerics: not run" in line


def test_a_mismatch_names_the_module_and_draws_its_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = f"verify nets.py:tiny nets.py:leaky {SHAPE} --json r.json --junit r.xml"
    code, out, _ = run(line, capsys)
    assert code == 1
    assert "first diverging module: 2 (ReLU): error " in out
    assert "+--------+\n|" in out
    data = json.loads(Path("r.json").read_text(), parse_constant=pytest.fail)
    assert data["divergence"]["module"] == "2"
    assert len(data["divergence"]["error_map"]) == 8
    (suite,) = ElementTree.parse("r.xml").getroot()
    assert suite.get("failures") == str(sum(not row["ok"] for row in data["rows"]))
    assert "first diverging module: 2" in ElementTree.tostring(suite, encoding="unicode")


def test_stress_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"verify nets.py:tiny net.onnx {SHAPE} --json r.json"
    assert run(line, capsys)[0] == 0
    assert len(json.loads(Path("r.json").read_text())["rows"]) == 5
    assert run(f"{line} --no-stress", capsys)[0] == 0
    assert len(json.loads(Path("r.json").read_text())["rows"]) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("verify nets.py:tiny", "nets.py:tiny: give a second side to compare it with, or a FILE."),
        ("verify net.onnx.manifest.json net.onnx", "a manifest is checked alone; leave out net"),
        ("verify gone.onnx.manifest.json", "gone.onnx.manifest.json: no such manifest"),
        (f"verify nets.py:tiny gone.onnx {SHAPE}", "gone.onnx: no such file"),
        (f"verify nets.py:tiny gone.engine {SHAPE}", "gone.engine: no such file"),
        (f"verify nets.py:tiny@cuda net.onnx {SHAPE}", "nets.py:tiny@cuda: @cuda has no meaning"),
        (f"verify nets.py:tiny net.onnx@collapsed {SHAPE}", "@collapsed has no meaning here"),
        ("verify nets.py:tiny net.onnx --inputs gone.npy", "--inputs gone.npy: there is no such"),
        ("verify nets.py:tiny net.onnx --inputs nets.py", "give a .npy or .npz file, a folder"),
        ("verify nets.py:tiny net.onnx --json no/r.json", "no/r.json: there is no folder no"),
        ("verify nets.py:tiny net.onnx --junit no/r.xml", "no/r.xml: there is no folder no"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(line, capsys)
    assert (code, len(err)) == (2, 1), err
    assert said in err[0]


@pytest.mark.parametrize(
    ("name", "save", "said"),
    [
        ("e.npy", lambda p: np.save(p, np.zeros((0, 3, 8, 8))), "holds (0, 3, 8, 8); the first"),
        (
            "o.npy",
            lambda p: np.save(p, np.array([{}]), allow_pickle=True),
            "cannot be read (Object",
        ),
        ("b.npy", lambda p: p.write_bytes(b"not numpy"), "cannot be read"),
        ("u.npz", lambda p: np.savez(p, a=np.zeros((2, 3)), b=np.zeros((3, 3))), "(2, 3), (3, 3)"),
        ("s.npy", lambda p: np.save(p, np.array(["a"])), "cannot be read (can't convert"),
    ],
)
def test_data_that_is_none_is_refused(
    name: str, save: Callable[[Path], Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(Path(name))
    code, _, (line,) = run(f"verify nets.py:tiny net.onnx --inputs {name}", capsys)
    assert code == 2
    assert line.startswith(f"orepa: --inputs {name}: ")
    assert said in line


def test_a_folder_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    Path("data").mkdir()
    code, _, (line,) = run("verify nets.py:tiny net.onnx --inputs data", capsys)
    assert (code, "this folder holds no .npy or .npz files" in line) == (2, True)
    np.savez("data/b.npz", image=np.ones((1, 3, 8, 8)))
    shutil.copy("images.npy", "data/a.npy")
    line = "verify nets.py:tiny net.onnx --inputs data --json r.json --no-stress"
    assert run(line, capsys)[0] == 0
    rows = json.loads(Path("r.json").read_text())["rows"]
    assert [row["shape"][0] for row in rows] == [2, 2, 1, 1]


def steps_of(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], list[str]]:
    code, _, err = run("verify net.onnx.manifest.json --json m.json --junit m.xml", capsys)
    steps = json.loads(Path("m.json").read_text())["steps"]
    return code, {step["step"]: step for step in steps}, err


def test_a_manifest_is_checked_again_without_model_or_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("nets.py").unlink()
    code, steps, err = steps_of(capsys)
    assert (code, err) == (0, [])
    verdicts = {name: step["verdict"] for name, step in steps.items()}
    assert verdicts == {
        **dict.fromkeys(("onnx file", "engine file", "samples file"), "pass"),
        **dict.fromkeys(("onnx gates", "certificate", "network gates", "onnx on the CPU"), "pass"),
        **dict.fromkeys(("onnx on the GPU", "engine"), "not run"),
    }
    assert "no GPU" in steps["engine"]["note"]
    assert len(steps["onnx on the CPU"]["report"]["rows"]) == 7
    (suite,) = ElementTree.parse("m.xml").getroot()
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "2")


def flip_a_bit_of_a_weight(path: Path) -> None:
    model = onnx.load(path)
    (tensor,) = (t for t in model.graph.initializer if t.name == "3.weight")
    content = bytearray(tensor.raw_data)
    content[40] ^= 1
    tensor.raw_data = bytes(content)
    onnx.save(model, path)


def test_one_changed_bit_is_found_by_two_hashes_and_by_no_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flip_a_bit_of_a_weight(Path("net.onnx"))
    code, steps, err = steps_of(capsys)
    assert code == 1
    assert steps["onnx on the CPU"]["verdict"] == "pass"
    assert err[0].startswith("onnx file: mismatch: onnx net.onnx: is another file than the one")
    assert err[1].startswith("onnx gates: mismatch: 3: net.onnx: its weight 3.weight has changed")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda: Path("net.onnx").unlink(), "onnx file: mismatch: onnx net.onnx: is not there"),
        (
            lambda: Path("net.engine").write_bytes(b"x"),
            "engine file: mismatch: engine net.engine: has 1 bytes of",
        ),
        (
            lambda: Path("net.onnx.samples.safetensors").unlink(),
            "samples file: mismatch: samples net.onnx.samples.safetensors: is not there",
        ),
        (
            lambda: Path("net.onnx").write_bytes(Path("net.onnx").read_bytes()[:900]),
            "onnx file: mismatch: onnx net.onnx: has 900 bytes of",
        ),
    ],
)
def test_files_that_do_not_fit_their_manifest(
    spoil: Callable[[], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil()
    code, _, err = steps_of(capsys)
    assert code == 1
    assert err[0].startswith(said)


def test_samples_of_another_model_are_a_mismatch(capsys: pytest.CaptureFixture[str]) -> None:
    path = "net.onnx.samples.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = {k: v + 1 if "input" not in k else v for k, v in load_file(path).items()}
    save_file(tensors, path, about)
    code, steps, _ = steps_of(capsys)
    assert code == 1
    assert steps["onnx on the CPU"]["verdict"] == "mismatch"
    assert steps["samples file"]["verdict"] == "mismatch"


def test_a_gpu_completes_what_was_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orepa_compiler.cli.run import rechecking
    from orepa_compiler.export import OnnxRunner

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rechecking, "TensorRTRunner", lambda path: OnnxRunner("net.onnx"))
    monkeypatch.setattr(rechecking, "OnnxRunner", lambda path, provider: OnnxRunner(path))
    code, steps, _ = steps_of(capsys)
    assert code == 0
    assert steps["engine"]["verdict"] == steps["onnx on the GPU"]["verdict"] == "pass"

    def wrong(path: Path) -> Callable[..., torch.Tensor]:
        return lambda *inputs: OnnxRunner("net.onnx")(*inputs) * 1.01  # type: ignore[operator]

    monkeypatch.setattr(rechecking, "TensorRTRunner", wrong)
    code, steps, err = steps_of(capsys)
    assert (code, steps["engine"]["verdict"]) == (1, "mismatch")
    assert err[0].startswith("engine: mismatch: FAIL: ")


def test_a_picture_of_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    line = f"verify nets.py:tiny nets.py:leaky {SHAPE} --picture error.png"
    assert run(line, capsys)[0] == 1
    assert Path("error.png").read_bytes().startswith(b"\x89PNG")
