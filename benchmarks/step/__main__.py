"""python -m benchmarks.step: measures, prints a table, writes JSON and the table of the docs."""

from __future__ import annotations

import os
import sys

# Read by OpenMP when a process begins.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ and "--threads" not in sys.argv:
        command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **_ENVIRONMENT})
    from benchmarks.step.command import app

    app()
