"""An export killed at any moment leaves the old files or the new ones, never half of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is a fork")
def test_twenty_kills_leave_the_old_files_or_the_new_ones(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_export.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == 20
    for kill in kills:
        assert kill["held"] in (kill["old"], kill["new"]), kill
    # Both were seen, and so was a kill between the two renames: two weights' files, one in use.
    changes = [kill for kill in kills if kill["old"] != kill["new"]]
    assert {kill["held"] == kill["new"] for kill in changes} == {True, False}
    assert any(len(kill["files"]) == 3 for kill in kills)
