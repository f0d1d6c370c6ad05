"""Progress of what takes longer than a moment, where stderr is a terminal; silence elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


@contextmanager
def announced(title: str) -> Iterator[Callable[[str], None]]:
    """A function that says which step is running; the time that it took so far stands beside it."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # A pipe gets nothing: rich would write every step into it.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        task = p.add_task(escape(title), total=None)
        yield lambda step: p.update(task, description=escape(f"{title}: {step}"))


@contextmanager
def build_monitor(tensorrt: ModuleType, console: Console) -> Iterator[Any]:
    """An IProgressMonitor that draws TensorRT's build phases, or None where nobody watches."""
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _monitor(tensorrt, progress)


def _monitor(tensorrt: ModuleType, progress: Progress) -> Any:
    # The base class belongs to whichever TensorRT was chosen, so the class is made here.
    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)
            self.tasks: dict[str, TaskID] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.tasks[phase_name] = progress.add_task(phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.tasks:
                progress.update(self.tasks[phase_name], completed=step + 1)
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.tasks:
                progress.remove_task(self.tasks.pop(phase_name))

    return Monitor()
