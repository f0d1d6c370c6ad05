"""The GPU's own benchmark, as far as a machine without one can run it: rows, page, resuming."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu import command, measuring
from benchmarks.gpu.measuring import CPU, CUDA, MODELS, TENSORRT, Check, Row, measure
from benchmarks.gpu.report import page
from orepa_compiler.errors import ExportError
from orepa_compiler.export import bench

ROOT = Path(__file__).parents[2]

NET = """
from torch import nn

def net():
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
              nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 70)]
    return nn.Sequential(*layers)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("net.py").write_text(NET)
    return tmp_path


def run(*options: str) -> int:
    line = [*options, "--output", "gpu.json", "--docs", "gpu.md"]
    return CliRunner().invoke(command.app, line).exit_code


def rows() -> list[Row]:
    return [Row.from_dict(row) for row in json.loads(Path("gpu.json").read_text())["rows"]]


def done(name: str, source: str, precision: str, *, batch: int) -> Row:
    """What a GPU would give."""
    timing = {"median_ms": 1.5, "p95_ms": 2.0, "throughput": 600.0, "calls": 9}
    latency = {"ratio": 1.0, "low": 0.9, "high": 1.1, "verdict": "within noise"}
    found = {
        "files": [{"nodes": 49}, {"nodes": 49}],
        "rows": [{"backend": b, "model": timing, "against": timing, **latency} for b in (CUDA,)],
    }
    checks = {CUDA: Check("pass", 1e-7, 2e-6), TENSORRT: Check("failed", None, None, "no SM 9.0")}
    return Row(name, precision, "done", "", checks, found, 3.0)


def test_without_a_gpu_every_row_says_so_and_why() -> None:
    assert run() == 4
    assert len(rows()) == 15
    assert {(row.state, row.reason) for row in rows()} == {
        ("not run", "torch sees no CUDA GPU here")
    }
    text = Path("gpu.md").read_text()
    assert "**0 of 15 rows were run.**" in text
    assert text.count("| not run | not run |\n") == 30
    assert "- every row: not run: torch sees no CUDA GPU here" in text
    assert "pass" not in text.partition("## Outputs")[2].partition("|")[2]


def test_it_goes_on_where_it_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def interrupted(name: str, source: str, precision: str, *, batch: int) -> Row:
        if len(ran) == 4:
            ran.append(("", ""))
            raise KeyboardInterrupt
        ran.append((name, precision))
        return done(name, source, precision, batch=batch)

    monkeypatch.setattr(command, "why_not_here", lambda: "")
    monkeypatch.setattr(command, "measure", interrupted)
    assert run() not in (0, 4)
    assert [row.state for row in rows()] == ["done"] * 4 + ["not run"] * 11
    assert "not reached yet" in Path("gpu.md").read_text()
    assert run() == 1  # an engine failed
    assert len(ran) == 16
    assert {row.state for row in rows()} == {"done"}
    text = Path("gpu.md").read_text()
    assert "| resnet18 | fp32 | pass 1.0e-07 (tolerance 2.0e-06) | failed |" in text
    timed = "1.500 / 1.500; 1.000 (0.900 to 1.100): within noise"
    assert f"| resnet18 | fp32 | 49 / 49 | {timed} | not run |" in text
    assert "- every row: TensorRT: failed: no SM 9.0" in text
    assert run("--redo") == 1
    assert len(ran) == 31


def test_a_gpu_that_is_gone_leaves_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", done)
    with monkeypatch.context() as here:
        here.setattr(command, "why_not_here", lambda: "")
        run()
    before = rows()
    assert run() == 1
    assert rows() == before


@pytest.mark.parametrize(
    ("verdict", "code"), [("pass", 0), ("mismatch", 1), ("failed", 1), ("not run", 4)]
)
def test_the_exit_code_is_the_worst_of_the_checks(verdict: str, code: int) -> None:
    row = Row("m", "fp32", "done", checks={CPU: Check("pass"), CUDA: Check(verdict)})
    assert command.exit_code([row]) == code
    assert command.exit_code([Row("m", "fp32", "failed"), Row("n", "fp32", "not run")]) == 1


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_row_is_measured_as_far_as_there_is_no_gpu(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(measuring, "bench", partial(bench, rounds=6, turn_s=0.001))
    row = measure("net", "net.py:net", precision, batch=2, size=32)
    assert (row.state, row.reason) == ("done", "")
    assert row.checks[CPU].verdict == "pass"
    assert row.checks[CPU].error is not None
    assert row.checks[CUDA].verdict == "not run"
    assert row.checks[TENSORRT].reason.startswith("collapsed.engine: device numerics: not run")
    ours, theirs = row.bench["files"]
    assert (ours["nodes"], ours["convs"]) == (theirs["nodes"], 2)
    assert [r["backend"] for r in row.bench["rows"]] == [CPU, CUDA, "OpenVINO CPU", TENSORRT]
    assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    assert "| net | " in page([row], {})


def test_an_engine_that_cannot_be_built_leaves_the_other_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Path:
        raise ExportError("compute_capability='9.0' is not one of 7.5, 8.0")

    monkeypatch.setattr(measuring, "build_engine", refuse)
    monkeypatch.setattr(measuring, "bench", partial(bench, rounds=6, turn_s=0.001))
    row = measure("net", "net.py:net", "fp32", batch=1, size=32)
    assert row.checks[TENSORRT] == Check(
        "failed", reason="compute_capability='9.0' is not one of 7.5, 8.0"
    )
    assert row.checks[CPU].verdict == "pass"


def test_a_model_that_fails_is_a_row() -> None:
    row = measure("odd", "torchvision:no_such_net", "fp32", batch=1)
    assert row.state == "failed"
    assert "no_such_net" in row.reason


def test_the_page_is_that_of_the_results() -> None:
    data = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())
    found = [Row.from_dict(row) for row in data["rows"]]
    assert [row.model for row in found] == [name for name in MODELS for _ in range(3)]
    assert page(found, data["machine"]) == (ROOT / "docs/gpu.md").read_text()


@pytest.mark.zoo
def test_the_segmentation_net_is_built_without_fetching_weights() -> None:
    net = measuring.build(MODELS["deeplabv3_mobilenet_v3_large"])
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) > 50
    assert not net.training
    assert all(float(norm.running_mean.abs().max()) > 0.1 for norm in norms)  # type: ignore[union-attr]
