"""python -m benchmarks.verdict: faults tried and caught, right pairs tried and failed."""

from __future__ import annotations

from benchmarks.verdict.command import app

app()
