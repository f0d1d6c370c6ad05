"""The commands: what they pass on, what they print, and the exit code of every outcome."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orepa_compiler import __version__
from orepa_compiler.checkpoints import save
from orepa_compiler.cli import export_main, main
from orepa_compiler.cli.run import comparing, sampling, stages, steps
from orepa_compiler.cli.run import named_sides as sides
from orepa_compiler.cli.run.steps import ExportStep
from orepa_compiler.compiler import expand
from orepa_compiler.errors import ExportError, MissingPackage, ReparamError
from orepa_compiler.model_source import load_model
from orepa_compiler.proving.certificate import Certificate
from tests.norms import randomise_norms

ROOT = Path(__file__).parents[2]

NETS = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
    def forward(self, left, right):
        return self.conv(left) + right
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with nets.py in it."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class FakeReport:
    agrees: bool = True
    max_error: float = 1e-7
    verdict: str = "FAIL: 1 comparison"
    worst: Any = None

    def __bool__(self) -> bool:
        return self.agrees

    def __str__(self) -> str:
        return "the comparison, number by number"

    def to_dict(self) -> dict[str, Any]:
        return {"agrees": self.agrees}


@dataclass
class Verbs:
    """Stand-ins for what an export calls: what they were given, and what they give or raise."""

    calls: dict[str, Any] = field(default_factory=dict)
    collapse_report: FakeReport = field(default_factory=FakeReport)
    onnx_report: FakeReport | Exception = field(default_factory=FakeReport)
    onnx_error: Exception | None = None
    engine_error: Exception | None = None
    runner_error: Exception | None = None

    def collapse(self, model: nn.Module, *, inputs: Any) -> nn.Module:
        self.calls["model"], self.calls["recorded on"] = model, inputs
        return nn.Identity()

    def verify(self, reference: Any, candidate: Any, inputs: Any, **options: Any) -> FakeReport:
        self.calls["inputs"] = inputs
        if candidate != "runner":
            return self.collapse_report
        self.calls["verify"] = options
        if isinstance(self.onnx_report, Exception):
            raise self.onnx_report
        return self.onnx_report

    def take_samples(self, model: Any, inputs: Any, **options: Any) -> str:
        self.calls["samples"] = options
        return "samples"

    def judge(self, samples: Any, candidate: Any) -> FakeReport:
        assert samples == "samples"
        return self.verify(None, candidate, self.calls["inputs"])

    def certify(self, model: Any, deploy: Any, inputs: Any) -> Certificate:
        return Certificate(())

    def write_manifest(self, export: Any, steps: Any) -> ExportStep:
        self.calls["manifest"] = [step.verdict for step in steps]
        return ExportStep("write manifest", "done")

    def export_onnx(self, model: Any, inputs: Any, path: Path, **options: Any) -> Path:
        self.calls["onnx"] = {"path": path, **options}
        if self.onnx_error:
            raise self.onnx_error
        path.write_bytes(b"onnx!")
        return path

    def build_engine(self, onnx: Path, path: Path, **options: Any) -> Path:
        self.calls["engine"] = {"onnx": onnx, "path": path, **options}
        if self.engine_error:
            raise self.engine_error
        path.write_bytes(b"engine")
        return path

    def runner(self, path: Path) -> str:
        if self.runner_error:
            raise self.runner_error
        return "runner"


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> Verbs:
    fakes = Verbs()
    for name in ("collapse", "verify", "certify", "export_onnx"):
        monkeypatch.setattr(stages, name, getattr(fakes, name))
    monkeypatch.setattr(sampling, "take_samples", fakes.take_samples)
    monkeypatch.setattr(steps, "judge", fakes.judge)
    monkeypatch.setattr(stages, "build_engine", fakes.build_engine)
    monkeypatch.setattr(
        stages._Export, "write_manifest", lambda self, steps: fakes.write_manifest(self, steps)
    )
    monkeypatch.setattr(stages._Export, "audit", lambda self: ExportStep("audit half", "done"))
    monkeypatch.setattr(comparing, "verify", fakes.verify)
    monkeypatch.setattr(stages, "OnnxRunner", fakes.runner)
    monkeypatch.setattr(sides, "OnnxRunner", lambda path, provider: fakes.runner(path))
    monkeypatch.setattr(stages, "explain_report", lambda *sides, **options: "all agree")
    monkeypatch.setattr(comparing, "explain_report", lambda *sides, **options: "all agree")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return fakes


def run(command: Callable[..., int], line: str, capsys: Any) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr."""
    code = command(line.split())
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


EXPORT = "nets.py:tiny --input-shape 3x8x8 --onnx net.onnx"


@pytest.mark.parametrize(
    ("command", "line"),
    [(export_main, "--help"), (main, "export -h"), (main, "plan --help"), (main, "verify --help")],
)
def test_help_teaches_by_examples_and_tells_the_exit_codes(
    command: Callable[..., int], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(command, line, capsys)
    assert (code, err) == (0, [])
    assert "Examples:" in out
    assert "nets.py:" in out
    for number in range(5):
        assert f"\n {number}  " in out


def test_orepa_alone_and_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(main, "", capsys)
    assert code == 0
    assert all(f"│ {name} " in out for name in ("plan", "export", "verify"))
    assert run(main, "--version", capsys)[1] == f"orepa-compiler {__version__}\n"


@pytest.mark.parametrize(
    ("command", "line", "said"),
    [
        (main, "collaps", "orepa: No such command 'collaps'"),
        (export_main, "", "orepa-export: Missing argument 'MODEL'; see orepa-export --help"),
        (export_main, "nets.py:tiny --onx a.onnx", "No such option: --onx"),
        (
            export_main,
            f"{EXPORT} --precision fp8",
            "Invalid value for '--precision': 'fp8' is not one of",
        ),
        (export_main, f"{EXPORT} --batch 0", "Invalid value for '--batch'"),
        (
            export_main,
            "nets.py:tiny",
            "nothing to write: give --onnx OUT.onnx, --trt OUT.engine or",
        ),
        (export_main, f"{EXPORT} --input-shape 3,8,8", "--input-shape 3,8,8: write it as sizes"),
        (export_main, f"{EXPORT} --input-shape 3x0x8", "--input-shape 3x0x8: write it as sizes"),
        (export_main, f"{EXPORT} --report no/r.json", "no/r.json: there is no folder no; create"),
        (export_main, "nets.py:tiny --onnx no/a.onnx", "no/a.onnx: there is no folder no; create"),
        (export_main, f"{EXPORT} --trt no/a.engine", "no/a.engine: there is no folder no; create"),
        (export_main, "timm:resnet_50 --onnx a.onnx", "timm:resnet_50: no model of"),
        (export_main, f"{EXPORT} --checkpoint gone.pth", "gone.pth: there is no such file"),
        (
            export_main,
            "nets.py:Pair --onnx a.onnx",
            "does not run on inputs of shape (2, 3, 224, 2",
        ),
        (main, "verify nets.py:tiny", "nets.py:tiny: give a second side to compare it with, or a"),
        (
            main,
            "verify nets.py:tiny b.onnx --checkpoint-b c.pth",
            "b.onnx: an exported file holds its",
        ),
        (main, "verify a.pth nets.py:tiny", "a.pth: weights alone are no model; name the model"),
        (main, "plan nets.py:tiny --block orepo", "--block orepo: choose one of auto, OREPA, "),
        (main, "plan nets.py:tiny --where !", "selects nothing; give a glob"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    command: Callable[..., int], line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(command, line, capsys)
    assert code == 2
    assert len(err) == 1, err
    assert said in err[0]
    assert out == ""


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(export_main, "nets.py:tinny --onnx a.onnx --debug", capsys)
    assert code == 2
    assert err[0].startswith("Traceback")
    assert err[-1].startswith("orepa-export: nets.py:tinny: ")


def test_something_unforeseen_is_one_line_and_no_pass(
    verbs: Verbs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stumble(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("orepa_compiler.compiler.plan", stumble)
    code, _, err = run(main, "plan nets.py:tiny", capsys)
    assert code == 4
    assert err == ["orepa: stopped by ZeroDivisionError: division by zero; --debug shows where"]


def test_an_export_that_passes(verbs: Verbs, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{EXPORT} --trt net.engine --report net.json"
    code, out, err = run(export_main, line, capsys)
    assert (code, err) == (0, [])
    rows = [row.split() for row in out.splitlines()[1:]]
    assert rows[0][:2] == ["load", "done"]
    assert rows[2] == ["check", "collapse", "1.0e-07", "pass"]
    assert rows[3][:4] == ["certify", "collapse", "done", "there"]
    assert rows[4] == ["write", "onnx", "net.onnx", "5", "done"]
    assert rows[5] == ["check", "onnx", "1.0e-07", "pass"]
    assert rows[6] == ["build", "engine", "net.engine", "6", "done"]
    assert "not run  device numerics: not run (there is no GPU here)" in out
    data = json.loads(Path("net.json").read_text())
    assert (data["verdict"], data["exit_code"]) == ("pass", 0)
    assert data["request"]["model"] == "nets.py:tiny"
    assert [step["verdict"] for step in data["steps"]][-2:] == ["not run", "done"]
    assert verbs.calls["manifest"][-1] == "not run"
    assert data["steps"][4]["bytes"] == 5
    assert len(data["steps"][4]["sha256"]) == 64
    assert data["steps"][5]["report"] == {"agrees": True}


def test_orepa_export_is_the_same_command(verbs: Verbs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, f"export {EXPORT}", capsys)[0] == 0
    assert Path("net.onnx").is_file()


def test_the_options_arrive(verbs: Verbs, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "nets.py:Pair --input-shape 3x8x8 --input-shape 4x1x1 --trt pair.engine --precision fp16 "
        "--static-batch --simplify --trt-flavor rtx --compute-capability 8.9"
    )
    assert run(export_main, line, capsys)[0] == 0
    shapes = [tuple(tensor.shape) for tensor in verbs.calls["inputs"][0]]
    assert shapes == [(1, 3, 8, 8), (1, 4, 1, 1)]
    assert not verbs.calls["model"].training
    assert verbs.calls["onnx"] == {
        "path": Path("pair.onnx"),
        "dynamic_batch": False,
        "dynamic_size": False,
        "input_names": None,
        "output_names": None,
        "precision": "fp16",
        "simplify": True,
        "opset": None,
        "certificate": None,
        "keep_fp32": (),
        "calibration": [],
        "int8_preset": None,
    }
    assert verbs.calls["samples"] == {"precision": torch.float16, "stress": True}
    assert verbs.calls["engine"] == {
        "onnx": Path("pair.onnx"),
        "path": Path("pair.engine"),
        "flavor": "rtx",
        "compute_capability": "8.9",
        **dict.fromkeys(("shapes", "timing_cache", "workspace_gb")),
        "tf32": False,
    }


@pytest.mark.parametrize(("given", "batch"), [("", 2), ("--batch 3", 3), ("--static-batch", 1)])
def test_the_batch_of_the_inputs(
    given: str, batch: int, verbs: Verbs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(export_main, f"{EXPORT} {given}", capsys)[0] == 0
    assert verbs.calls["inputs"][0][0].shape == (batch, 3, 8, 8)


OUTCOMES: dict[str, tuple[dict[str, Any], int, str, set[str]]] = {
    "the collapsed model differs": (
        {"collapse_report": FakeReport(False)},
        1,
        "check collapse: mismatch: FAIL: 1 comparison",
        set(),
    ),
    "the ONNX file differs": (
        {"onnx_report": FakeReport(False, max_error=float("inf"))},
        1,
        "check onnx: mismatch: FAIL: 1 comparison",
        {"net.onnx"},
    ),
    "the ONNX file cannot be written": (
        {"onnx_error": ExportError("bn1: not collapsed")},
        3,
        "write onnx: failed: bn1: not collapsed",
        set(),
    ),
    "the exporter breaks": (
        {"onnx_error": RuntimeError("deep\ndown")},
        3,
        "write onnx: failed: RuntimeError: deep down",
        set(),
    ),
    "the engine cannot be built": (
        {"engine_error": ExportError("no kernel for node 3")},
        3,
        "build engine: failed: no kernel for node 3",
        {"net.onnx"},
    ),
    "onnxruntime is missing": (
        {"runner_error": MissingPackage("this needs the package onnxruntime")},
        4,
        "check onnx: not run: this needs the package onnxruntime",
        {"net.onnx", "net.engine"},
    ),
    "the comparison cannot be made": (
        {"onnx_report": ReparamError("no truth")},
        4,
        "check onnx: not run: no truth",
        {"net.onnx", "net.engine"},
    ),
}


@pytest.mark.parametrize(
    ("changes", "code", "said", "written"), OUTCOMES.values(), ids=OUTCOMES.keys()
)
def test_each_way_to_fall_short_has_its_exit_code(
    changes: dict[str, Any],
    code: int,
    said: str,
    written: set[str],
    verbs: Verbs,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vars(verbs).update(changes)
    line = f"{EXPORT} --trt net.engine --report net.json"
    found, out, err = run(export_main, line, capsys)
    assert (found, err) == (code, [said])
    assert ("the comparison, number by number" in out) == (code == 1)
    files = {path.name for path in folder.iterdir()} - {"nets.py", "__pycache__", "net.json"}
    assert files == written
    assert json.loads(Path("net.json").read_text(), parse_constant=pytest.fail)["exit_code"] == code


def test_the_engine_is_run_and_counts_where_there_is_a_gpu(
    verbs: Verbs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def refuse(path: Path) -> None:
        raise ExportError(f"{path}: TensorRT failed to run the engine")

    monkeypatch.setattr(stages, "TensorRTRunner", refuse)
    code, _, err = run(export_main, f"{EXPORT} --trt net.engine", capsys)
    assert code == 4
    assert err == ["check engine: not run: net.engine: TensorRT failed to run the engine"]
    monkeypatch.setattr(stages, "TensorRTRunner", verbs.runner)
    code, out, _ = run(export_main, f"{EXPORT} --trt net.engine", capsys)
    assert code == 0
    assert "check engine" in out
    assert "not run" not in out


def test_a_checkpoint_is_loaded_before_the_collapse(
    verbs: Verbs, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save({"state_dict": trained.state_dict()}, "best.pth")
    code, out, _ = run(export_main, f"{EXPORT} --checkpoint best.pth", capsys)
    assert code == 0
    assert "no --checkpoint" not in out
    assert torch.equal(verbs.calls["model"][0].weight, trained[0].weight)
    assert verbs.calls["recorded on"] is verbs.calls["inputs"]


def test_a_pickle_is_read_only_when_allowed(
    verbs: Verbs, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "whole.pth")
    line = f"{EXPORT} --checkpoint whole.pth"
    code, _, err = run(export_main, line, capsys)
    assert code == 2
    assert "--allow-pickle" in err[0]
    assert run(export_main, f"{line} --allow-pickle", capsys)[0] == 0


@pytest.mark.parametrize(("agrees", "code"), [(True, 0), (False, 1)])
def test_verify_prints_and_writes_its_report(
    agrees: bool, code: int, verbs: Verbs, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs.onnx_report = FakeReport(agrees)
    line = "verify nets.py:tiny net.onnx --input-shape 3x8x8 --precision bf16 --report r.json"
    found, out, err = run(main, line, capsys)
    assert (found, err) == (code, [])
    assert "the comparison, number by number" in out
    data = json.loads(Path("r.json").read_text())
    assert (data["agrees"], data["candidate"]) == (agrees, "net.onnx")
    assert verbs.calls["verify"] == {"precision": "bf16", "stress": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"runner_error": MissingPackage("this needs onnxruntime")},
        {"onnx_report": ReparamError("this needs onnxruntime")},
    ],
)
def test_a_verify_that_cannot_be_made_is_no_mismatch(
    changes: dict[str, Any], verbs: Verbs, capsys: pytest.CaptureFixture[str]
) -> None:
    vars(verbs).update(changes)
    code, _, err = run(main, "verify nets.py:tiny net.onnx --input-shape 3x8x8", capsys)
    assert code == 4
    assert len(err) == 1
    assert err[0].endswith("this needs onnxruntime")


def test_plan_prints_what_expand_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(main, "plan nets.py:tiny --input-shape 3x8x8", capsys)
    assert (code, err) == (0, [])
    assert "expand 1" in out
    data = json.loads(run(main, "plan nets.py:tiny --block orepa --json", capsys)[1])
    assert [edit["path"] for edit in data["edits"] if edit["done_by"] == "expand"] == ["0"]
    out = run(main, "plan nets.py:tiny --where !0 --json", capsys)[1]
    assert not [edit for edit in json.loads(out)["edits"] if edit["done_by"] == "expand"]


def test_a_trained_block_net_goes_all_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    net = randomise_norms(load_model("nets.py:tiny"))
    expanded = expand(net, init="paper")
    save(expanded, "best.safetensors")
    line = f"{EXPORT} --checkpoint best.safetensors --trt net.engine --report net.json"
    code, out, err = run(export_main, line, capsys)
    assert (code, err) == (0, [])
    assert Path("net.engine").stat().st_size > 0
    steps = {step["step"]: step for step in json.loads(Path("net.json").read_text())["steps"]}
    assert steps["check collapse"]["report"]["ok"]
    assert steps["check onnx"]["report"]["ok"]
    assert steps["check engine"]["verdict"] == ("pass" if torch.cuda.is_available() else "not run")
    # The file computes the trained net, and not the stock net that the command began with.
    verify = "verify nets.py:tiny net.onnx --input-shape 3x8x8"
    code, out, _ = run(main, f"{verify} --checkpoint-a best.safetensors", capsys)
    assert (code, out[:4]) == (0, "PASS")
    code, out, _ = run(main, verify, capsys)
    assert (code, out[:4]) == (1, "FAIL")


def test_half_precision_goes_all_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(export_main, f"{EXPORT} --precision fp16 --static-batch", capsys)
    assert (code, err) == (0, [])
    verify = "verify nets.py:tiny net.onnx --input-shape 3x8x8 --precision"
    assert run(main, f"{verify} fp16 --batch 1", capsys)[0] == 0
    assert run(main, f"{verify} fp32 --batch 1", capsys)[0] != 0
    code, _, err = run(main, f"{verify} fp16 --batch 3", capsys)
    assert code == 4
    assert len(err) == 1


def test_the_same_name_gives_the_same_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, "verify nets.py:tiny nets.py:tiny --input-shape 3x8x8", capsys)[0] == 0


def test_the_console_scripts_point_at_the_commands() -> None:
    lines = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[1].splitlines()[1:3]
    scripts = dict(line.replace('"', "").split(" = ") for line in lines)
    assert scripts.keys() == {"orepa", "orepa-export"}
    found = [place.split(":") for place in scripts.values()]
    assert [getattr(import_module(module), name) for module, name in found] == [main, export_main]


def test_a_mistake_in_a_real_process(folder: Path) -> None:
    code = "import sys; from orepa_compiler.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "torchvision:resnet5"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "did you mean resnet50 or" in done.stderr
    assert done.stdout == ""
