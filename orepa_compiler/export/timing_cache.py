"""TensorRT's timing cache: what one build measured of its kernels, so that the next need not."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from orepa_compiler.atomic import staged
from orepa_compiler.errors import ExportError


def read_timing_cache(tensorrt: ModuleType, config: Any, path: Path) -> None:
    """Gives the timings in the file at `path`, or none where there is no such file, to a build.

    Raises ExportError for a file that this TensorRT or GPU cannot use, and for TensorRT for RTX,
    which keeps no such timings.
    """
    if hasattr(config, "num_compute_capabilities"):
        raise ExportError(
            f"{path}: {tensorrt.__name__} times no kernels and has no timing cache; leave it out, "
            "or build with flavor='trt'"
        )
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    # False: timings of another GPU are not taken for this one's.
    if cache is None or not config.set_timing_cache(cache, False):
        raise ExportError(
            f"{path}: this timing cache ({len(content)} bytes) is not of {tensorrt.__name__} "
            f"{tensorrt.__version__} on this GPU; remove it, or give another path"
        )


def write_timing_cache(config: Any, path: Path) -> None:
    """Writes all timings that a build now has to `path`, whole or not at all."""
    with staged(path) as draft:
        draft.write_bytes(bytes(config.get_timing_cache().serialize()))
