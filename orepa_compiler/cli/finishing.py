"""The end of a command that ran in steps: its table, its complaints and its exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from orepa_compiler.cli.junit import write_junit
from orepa_compiler.cli.steps import Step
from orepa_compiler.cli.summary import (
    cases,
    complaints,
    show_steps,
    verdict,
)


def finish(suite: str, steps: Sequence[Step], junit: Path | None, debug: bool) -> int:
    show_steps(steps)
    if junit:
        write_junit(junit, suite, cases(steps))
    for step in steps:
        if debug and step.cause:
            traceback.print_exception(step.cause)
    for line in complaints(steps):
        print(line, file=sys.stderr)
    return verdict(steps)
