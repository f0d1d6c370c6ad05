"""python -m benchmarks.gpu_day: measures, and writes each row as it is done."""

from __future__ import annotations

from benchmarks.gpu_day.command import app

if __name__ == "__main__":
    app()
