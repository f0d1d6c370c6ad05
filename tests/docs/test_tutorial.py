"""The tutorial notebook: its cells run in order, in a folder of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tutorial.ipynb"


def test_the_cells_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OREPA_EXAMPLE_FAST", "1")
    names: dict[str, object] = {"__name__": "tutorial"}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    for number, cell in enumerate(cells):
        assert not cell.get("outputs"), f"cell {number}: clear the outputs before you commit"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK} cell {number}", "exec"), names)
    said = capsys.readouterr().out
    found = [line for line in said.splitlines() if line.startswith(("collapsed:", "ONNX file:"))]
    assert len({line.partition(": ")[2] for line in found}) == 1, "one accuracy for both"
    assert (tmp_path / "digits.onnx").is_file()
