"""Files of several exports at once, on a full disk, and in a folder that is closed: old or new."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import orepa_compiler as orepa
from orepa_compiler.errors import ExportError
from orepa_compiler.export import export_onnx
from orepa_compiler.export.onnx import writing as exporting
from tests.export.nets import SmallNet, images

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told() -> Iterator[list[dict]]:
    # Not in pytest's own folder, which an ordinary user may not even enter.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("written_together.py"), folder],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        yield [json.loads(line) for line in done.stdout.splitlines()]


def test_exports_to_one_path_leave_one_of_them_whole(told: list[dict]) -> None:
    found = told[0]
    assert found["said"] == ["done"] * 3
    assert found["held"] in (0, 1)
    # The graph and its own weights: none of another's, and no folder of a draft.
    assert len(found["files"]) == 2, found["files"]


def test_a_folder_that_is_closed_is_told_and_stays_as_it_is(told: list[dict]) -> None:
    found = told[1]
    assert found["same"]
    assert len(found["said"]) == 2
    for said in found["said"]:
        assert said.startswith("ExportError"), said
        assert "cannot write into the folder" in said
        assert "Permission denied" in said


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """As on a full disk: no file grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [exporting.EMBED_LIMIT_BYTES, 0], ids=["one file", "two"])
def test_a_full_disk_leaves_the_old_export(
    limit: int, net: SmallNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "EMBED_LIMIT_BYTES", limit)

    def export() -> object:
        return export_onnx(net, images(), tmp_path / "net.onnx")

    _old_stands(export, tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint(net: SmallNet, tmp_path: Path) -> None:
    _old_stands(lambda: orepa.save(net, tmp_path / "net.safetensors"), tmp_path)


def _old_stands(write: Callable[[], object], folder: Path) -> None:
    write()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with room_for(1000), pytest.raises(ExportError, match="cannot be written whole"):
        write()
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
