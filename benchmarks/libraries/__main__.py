"""python -m benchmarks.libraries: goes over the models of installed libraries."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no weights are read

if __name__ == "__main__":
    from benchmarks.libraries.command import app

    app()
