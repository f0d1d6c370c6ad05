"""Attempts one step of a command, and holds what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from orepa_compiler.export.audit import HalfAudit
from orepa_compiler.export.latency import Timing
from orepa_compiler.proving.certificate import Certificate
from orepa_compiler.report import BlockBranches, ModelSize
from orepa_compiler.verification import Report, Samples, judge
from orepa_compiler.verification.divergence import Divergence

Verdict = Literal["pass", "mismatch", "failed", "not run", "done"]

# Said of an engine that no GPU has run; it is not a pass.
NOT_RUN_ON_A_GPU = "device numerics: not run"


@dataclass(frozen=True)
class ExportStep:
    """One step of an export and what came of it.

    error: the largest error of a comparison. report: the comparison itself. cause: what kept the
    step from being done. is_required: whether the export has failed to verify without it.
    certificate, divergence: what a certificate says, and where a comparison that fails first does;
    a text where that cannot be told. audit: what half precision would do to the values. sizes,
    branches: what a page shows of the models. latency: of a file that was run. scores: what the
    user's own function gave.
    """

    name: str
    verdict: Verdict
    file: Path | None = None
    error: float | None = None
    note: str = ""
    report: Report | None = None
    cause: Exception | None = None
    is_required: bool = True
    seconds: float = 0.0
    certificate: Certificate | None = None
    divergence: Divergence | str | None = None
    audit: HalfAudit | None = None
    sizes: tuple[ModelSize, ...] = ()
    branches: tuple[BlockBranches, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    latency: Timing | None = None


def attempt(
    name: str, is_check: bool, run: Callable[[], ExportStep], *, is_required: bool = True
) -> ExportStep:
    """What a step came to, whatever happens in it."""
    start = time.perf_counter()
    try:
        step = run()
        is_required = is_required or step.verdict == "mismatch"
        step = replace(step, is_required=step.is_required and is_required)
    except Exception as error:  # whatever stops a step is told in one line, and is no pass
        # A check that cannot be made says nothing against the artifact: the next step may go on.
        verdict: Verdict = "not run" if is_check else "failed"
        step = ExportStep(name, verdict, cause=error, is_required=is_required)
        if not is_required:
            step = replace(step, note=" ".join(str(error).split()))
    return replace(step, seconds=time.perf_counter() - start)


def judged(name: str, samples: Samples, runner: Callable[..., Any]) -> ExportStep:
    """The verdict on an artifact by samples of the model that it was made from."""
    step = compared(name, judge(samples, runner))
    placement: dict[str, int] = getattr(runner, "placement", {})
    where = (f"{count} nodes on {provider}" for provider, count in placement.items())
    return replace(step, note=", ".join(where))


def compared(name: str, report: Report) -> ExportStep:
    """The step that a comparison is."""
    return ExportStep(name, "pass" if report else "mismatch", error=report.max_error, report=report)


def finite(error: float | None) -> float | None:
    """The error if JSON can hold it; inf stands for an output that could not be compared at all."""
    return error if error is not None and isfinite(error) else None
