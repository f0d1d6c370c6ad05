"""What the pages on export, verification and the GPU show happens: code runs, lines parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.cli import app, export_app
from tests.docs.test_readme import BLOCK
from tests.norms import randomise_norms

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("export.md", "verification.md", "gpu.md", "ci/cpu.yml", "ci/gpu.yml")


def run_blocks(page: str, names: dict[str, Any]) -> int:
    text = (DOCS / page).read_text()
    blocks = list(BLOCK.finditer(text))
    assert text.count("```python") == len(blocks), "a snippet does not end"
    for block in blocks:
        # Empty lines in front let a traceback name the page's own line.
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], str(DOCS / page), "exec"), names)
    return len(blocks)


def test_the_code_of_the_export_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_blocks("export.md", {"__name__": "export"}) == 2
    said = capsys.readouterr().out
    assert "overflow" in said
    assert "subnormal" in said


def test_the_code_of_the_verification_page_runs(tmp_path: Path) -> None:
    convs = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = randomise_norms(orepa.expand(nn.Sequential(*convs))).eval()
    images = torch.randn(2, 3, 16, 16)
    names = {"orepa": orepa, "model": model, "deploy": orepa.collapse(model), "images": images}
    assert run_blocks("verification.md", names) == 2
    assert names["report"]
    names["test_the_deployed_model"](model, images, tmp_path)  # type: ignore[operator]
    assert (tmp_path / "model.onnx").stat().st_size > 1_000


def command_lines(text: str) -> list[list[str]]:
    """Every command line of ours: indented or in a block, joined where it is continued."""
    joined = re.sub(r"\\\n\s*", " ", text)
    # What a workflow folds (>-) is one line for as long as it is indented further.
    joined = re.sub(r">-\n((?: {10}.*\n)+)", lambda m: " ".join(m[1].split()) + "\n", joined)
    starts = r"^(?:\s*- run:)?\s*((?:orepa-export|orepa (?:plan|export|verify|bench)) .*)$"
    found = [shlex.split(line) for line in re.findall(starts, joined, re.MULTILINE)]
    return [words for words in found if not words[1].endswith(":")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_of_a_page_is_one(page: str) -> None:
    lines = command_lines((DOCS / page).read_text())
    assert len(lines) >= 2
    group: Any = typer.main.get_command(app)
    for name, *words in lines:
        command = typer.main.get_command(export_app)
        if name == "orepa":
            command, words = group.commands[words[0]], words[1:]
        command.make_context(name, words)  # parses, and runs nothing


def test_a_line_with_an_option_that_is_not_there_is_none() -> None:
    ((_, *words),) = command_lines("    orepa-export a.py:b \\\n      --onnx b.onnx --no-such 3\n")
    with pytest.raises(Exception, match="No such option"):
        typer.main.get_command(export_app).make_context("orepa-export", words)
