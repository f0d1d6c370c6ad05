"""python -m benchmarks.zoo: goes over the models and writes the results and docs/zoo.md."""

from __future__ import annotations

import os
import sys

# Read by OpenMP and by the allocator when a process begins. Huge pages: a model's memory is touched
# once and given back, and small pages then cost more than the arithmetic.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in _ENVIRONMENT.items()):
        command = [sys.executable, "-m", "benchmarks.zoo", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **_ENVIRONMENT})
    from benchmarks.zoo.command import app

    app()
