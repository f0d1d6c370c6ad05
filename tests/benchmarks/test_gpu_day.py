"""The day with a GPU, rehearsed: rows in their order, written as they are done, kept and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks.gpu_day import command, equality, report
from benchmarks.gpu_day.rows import REHEARSAL, Row, Scale, cost, rows, run
from orepa_compiler.errors import ReparamError
from orepa_compiler.generation import batched

FP32 = equality.PRECISIONS[0]
MODEL = REHEARSAL.models[0]


def test_the_kernels_of_a_device_are_those_of_float64() -> None:
    found = equality.kernels(MODEL, "cpu", FP32, "together")
    assert found["verdict"] == "pass"
    assert 0 < float(found["gradient"]) < 1e-5


def test_a_wrong_kernel_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "_repeated_identity", lambda *_: torch.zeros(1))
    scaled = batched.scaled_stack
    monkeypatch.setattr(
        batched, "scaled_stack", lambda kernel, factor: 1.001 * scaled(kernel, factor)
    )
    assert equality.kernels(MODEL, "cpu", FP32, "together")["verdict"] == "differs"


def test_a_step_is_measured_by_the_plain_nets_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert equality.step(MODEL, "cpu", FP32, 32)["verdict"] == "pass"
    monkeypatch.setattr(equality, "NOISE", 0.0)
    assert equality.step(MODEL, "cpu", FP32, 32)["verdict"] == "differs"


def test_a_collapse_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    assert equality.collapsed(MODEL, "cpu", FP32, 32)["verdict"] == "pass"
    made = equality.orepa.collapse

    def wrong(model: nn.Module) -> nn.Module:
        deploy = made(model)
        with torch.no_grad():
            next(deploy.parameters()).mul_(1.01)
        return deploy

    monkeypatch.setattr(equality.orepa, "collapse", wrong)
    assert equality.collapsed(MODEL, "cpu", FP32, 32)["verdict"] == "differs"


def test_a_step_has_a_time() -> None:
    assert float(cost(MODEL, "two-phase", "cpu", 2, 32)["ms"]) > 0


def test_an_error_is_one_rows() -> None:
    def refused() -> Any:
        raise ReparamError("no graphs here")

    def broken() -> Any:
        raise ValueError("first line\nsecond")

    assert run("a", refused).state == "not run"
    assert run("a", refused).reason == "no graphs here"
    row = run("b", broken)
    assert (row.state, row.reason) == ("failed", "ValueError: first line")


def test_equality_comes_before_times_and_compilers_last() -> None:
    names = [name for name, _ in rows("cuda", Scale())]
    assert len(set(names)) == len(names)
    kinds = [name.split(",")[0] + ("c" if "ompiled" in name else "") for name in names]
    assert list(dict.fromkeys(kinds)) == ["kernels", "step", "collapse", "stepc", "engine"]
    assert "step, resnet18, batch 64, two-phase, graphs" in names


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []

    def work(name: str) -> Any:
        def make() -> dict[str, float | str]:
            done.append(name)
            return {"ms": 2.0, "verdict": "pass"}

        return make

    monkeypatch.setattr(command, "rows", lambda device, scale: [(n, work(n)) for n in "ab"])
    return done


def test_rows_are_kept_and_time_is_kept_to(tmp_path: Path, few: list[str]) -> None:
    output = tmp_path / "new" / "rows.json"
    arguments = ["--device", "cpu", "--output", str(output)]
    done = CliRunner().invoke(command.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert [row["state"] for row in json.loads(output.read_text())["rows"]] == ["done", "done"]
    CliRunner().invoke(command.app, arguments, catch_exceptions=False)
    assert few == ["a", "b"]
    CliRunner().invoke(command.app, [*arguments, "--redo"], catch_exceptions=False)
    assert few == ["a", "b", "a", "b"]


def test_what_was_not_reached_says_so(tmp_path: Path, few: list[str]) -> None:
    output = tmp_path / "rows.json"
    clock = iter([0.0, 1.0, 1.0, 2.0, 100.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.time, "perf_counter", lambda: next(clock))
        arguments = ["--device", "cpu", "--minutes", "1", "--output", str(output)]
        done = CliRunner().invoke(command.app, arguments, catch_exceptions=False)
    assert done.exit_code == 4
    assert few == ["a"]
    assert json.loads(output.read_text())["rows"][1]["reason"] == "1 minutes were over"


def test_without_a_gpu_it_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = CliRunner().invoke(command.app, [])
    assert done.exit_code == 2
    assert "--device cpu rehearses" in " ".join(done.output.split())


def test_exit_codes() -> None:
    done, left = Row("a", "done", {"verdict": "pass"}), Row("c")
    differs = Row("b", "done", {"verdict": "differs"})
    cases = ([done], [done, left], [done, differs, left])
    assert [command.exit_code(case) for case in cases] == [0, 4, 1]


def test_the_page_says_not_run_until_it_was() -> None:
    text = report.page([], {})
    assert "| resnet18, batch 64, plain | not run | - | not run | - |" in text
    names = ["step, resnet18, batch 64, plain", "step, resnet18, batch 64, two-phase"]
    made = [Row(name, "done", {"ms": 10.0 + n, "MB": 100.0}, "") for n, name in enumerate(names)]
    text = report.page(made, {"gpu": "a GPU", "torch": "2"})
    assert text.startswith("a GPU, torch 2\n")
    assert "| resnet18, batch 64, two-phase | 11.0 | 1.100 | 100.0 | 1.000 |" in text
