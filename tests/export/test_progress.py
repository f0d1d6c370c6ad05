"""Progress is drawn where somebody watches, and nowhere else."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from orepa_compiler import progress
from orepa_compiler.progress import announced, build_monitor


def watch(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> io.StringIO:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=80)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    return screen


def test_steps_are_announced_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch(monkeypatch, is_terminal=True)
    with announced("exporting [/net].onnx") as step:  # no markup of rich's
        step("tracing")
    assert "exporting [/net].onnx: tracing" in screen.getvalue()


def test_nothing_is_announced_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch(monkeypatch, is_terminal=False)
    with announced("exporting") as step:
        step("tracing")
    assert screen.getvalue() == ""


def test_build_phases_are_drawn_on_a_terminal() -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with build_monitor(tensorrt, console) as monitor:
        monitor.phase_start("Building engine", None, 2)
        monitor.phase_start("Timing", "Building engine", 3)
        assert monitor.step_complete("Building engine", 0), "False would cancel the build"
        assert monitor.step_complete("never started", 0)
        monitor.phase_finish("Timing")
        monitor.phase_finish("Timing")
        assert monitor.tasks.keys() == {"Building engine"}
    assert "Building engine" in screen.getvalue()


def test_there_is_no_monitor_where_nobody_watches() -> None:
    with build_monitor(None, Console(file=io.StringIO())) as monitor:  # type: ignore[arg-type]
        assert monitor is None
