"""What docs/int8.md shows is what happens: its recipe runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.test_readme import BLOCK

PAGE = Path(__file__).parents[2] / "docs" / "int8.md"


def test_the_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    (recipe,) = BLOCK.finditer(text)
    assert text.count("```python") == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(recipe[1], str(PAGE), "exec"), {"__name__": "int8"})
    assert (tmp_path / "net.onnx").exists()
