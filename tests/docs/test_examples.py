"""Each example runs as a user would run it, and writes only where it is told to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))


def files_under(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all, as in `make demo`: an example finds there what those before it wrote."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, folder: Path) -> None:
    before = files_under(ROOT / "examples")
    environment = {**os.environ, "OREPA_EXAMPLE_FAST": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, example, "--output", "written"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows what it did"
    stray = {path for path in files_under(folder) if path.parts[0] != "written"}
    assert not stray, f"written outside the folder given by --output: {sorted(stray)}"
    assert files_under(ROOT / "examples") == before
