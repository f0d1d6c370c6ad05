"""What README.md shows is what happens: its Python runs, and its plan is the one printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orepa_compiler.cli import main

README = Path(__file__).parents[2] / "README.md"
PLAN_FLAGS = re.MULTILINE | re.DOTALL
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_python_blocks_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = README.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks, "README.md has no python block"
    assert text.count("```python") == len(blocks), "a python block of README.md does not end"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        # Empty lines in front let a traceback name the README's own line.
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], str(README), "exec"), names)


def test_the_plan_that_the_readme_shows_is_the_one_that_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = re.search(r"^```\n\$ orepa (plan [^\n]*)\n(.*?)^```$", README.read_text(), PLAN_FLAGS)
    assert shown, "README.md shows no plan"
    assert main(shown[1].split()) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines()]
    assert printed == shown[2].splitlines()
