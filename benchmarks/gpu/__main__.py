"""python -m benchmarks.gpu: builds, compares and times, and writes docs/gpu.md."""

from __future__ import annotations

from benchmarks.gpu.command import app

app()
