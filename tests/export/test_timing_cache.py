"""The timing cache of classic TensorRT: read, kept, and refused where it cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orepa_compiler.errors import ExportError
from orepa_compiler.export import build_engine
from orepa_compiler.export.tensorrt.engine import read_timing_cache, write_timing_cache

CLASSIC: Any = type("tensorrt", (), {"__version__": "11.4"})


class Config:
    """A build configuration of classic TensorRT, which takes only its own cache."""

    def __init__(self) -> None:
        self.cache: Any = None

    def create_timing_cache(self, content: bytes) -> Any:
        return self if content in (b"", b"timings") else None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache

    def serialize(self) -> bytearray:
        return bytearray(b"timings")


def test_a_cache_is_made_where_there_is_none_and_read_where_there_is(tmp_path: Path) -> None:
    path = tmp_path / "timings"
    for _ in range(2):
        config = Config()
        read_timing_cache(CLASSIC, config, path)
        assert config.cache is config
        write_timing_cache(config, path)
        assert path.read_bytes() == b"timings"


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "timings").write_bytes(b"of another GPU")
    message = r"timings: this timing cache \(14 bytes\) is not of tensorrt 11.4 on this GPU; remove"
    with pytest.raises(ExportError, match=message):
        read_timing_cache(CLASSIC, Config(), tmp_path / "timings")


@pytest.mark.usefixtures("no_gpu")
def test_tensorrt_for_rtx_keeps_none(exported: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert not torch.cuda.is_available()
    message = r"cache: tensorrt_rtx times no kernels and has no timing cache; .*flavor='trt'"
    with pytest.raises(ExportError, match=message):
        build_engine(exported["fp32"], tmp_path / "a.engine", timing_cache=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
