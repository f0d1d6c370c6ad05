"""python -m benchmarks.int8: makes the runs that are missing, and the table."""

from __future__ import annotations

import os

# Small nets: a second thread would mostly wait. Read by OpenMP when a process begins.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if __name__ == "__main__":
    from benchmarks.int8.command import app

    app()
