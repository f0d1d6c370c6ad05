"""python -m benchmarks.field: collapses every block and model, and writes docs/field.md."""

from __future__ import annotations

from benchmarks.field.command import app

app()
