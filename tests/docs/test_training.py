"""What docs/training.md shows is what happens: its snippets run in order."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.docs.test_readme import BLOCK

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


# torch warns of the schedule that it steps itself: the one inside SequentialLR.
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) > 10
    assert text.count("```python") == len(blocks), "a snippet does not end"
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    names: dict[str, object] = {"__name__": "training"}
    try:
        for block in blocks:
            if "torchao" in block[1] and find_spec("torchao") is None:
                continue  # none of our dependencies; tests/training/test_pt2e.py has the rest
            # Empty lines in front let a traceback name the page's own line.
            lines_before = text.count("\n", 0, block.start(1))
            exec(compile("\n" * lines_before + block[1], str(PAGE), "exec"), names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
