"""The benchmark of int8: each method makes a file, and the page says what was run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.int8 import command, methods
from benchmarks.int8.methods import METHODS, Setting
from benchmarks.int8.report import BEGIN, END, interval, lines, write_page
from benchmarks.study.data import Split

SMALL = Setting("OREPA-VGG", 0, train=50, epochs=1, tuned=1, batch=25)


def images(**options: object) -> Split:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(500, 1, 14, 14, generator=generator), torch.arange(500) % 10
    return Split((x[:50], y[:50]), (x[50:], y[50:]), (x, y))


def record(net: str, seed: int, gain: float) -> dict[str, object]:
    found = {name: {"accuracy": 70.0 + gain, "bytes": 100} for name in METHODS}
    found["float"] = {"accuracy": 70.0, "bytes": 400}
    return {"run": {"net": net, "seed": seed}, "found": found}


def test_every_method_makes_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "split", lambda name, **options: images())
    found = command.run(SMALL)
    assert found.keys() == METHODS.keys()
    sizes = {name: one["bytes"] for name, one in found.items()}
    for name, one in found.items():
        assert 0 <= one["accuracy"] <= 100
        is_int8 = not name.startswith("float")
        assert (sizes[name] < sizes["float"] / 2) == is_int8


def test_the_page_has_the_means_and_how_many_seeds(tmp_path: Path) -> None:
    records = [record("residual", 0, -0.5), record("residual", 1, 0.5), record("mobile", 0, 0.25)]
    page = tmp_path / "int8.md"
    page.write_text(f"before\n{BEGIN}{END}after\n")
    (tmp_path / "pictures").mkdir()
    write_page(records, page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}| accuracy of the file")
    assert text.endswith(f"{END}after\n")
    assert "residual (n = 2) | mobile (n = 1)" in text
    assert "| QAT in training form | +0.00 ± 6.36 | +0.25 |" in lines(records)
    said = "| *QAT in training form, minus QAT after collapse* | +0.00 ± 0.00 | +0.00 |"
    assert said in lines(records)
    said = "The small nets: trained on 2,000 images of 14 x 14, 6 epochs at rate 0.2, all but"
    assert said in text
    assert "| bytes of the QAT file / float | 0.25 | 0.25 |" in text
    assert "| processor time of the QAT file / float | not measured | not measured |" in text
    first = (tmp_path / "pictures" / "int8.svg").read_bytes()
    write_page(records, page)
    assert (page.read_text(), (tmp_path / "pictures" / "int8.svg").read_bytes()) == (text, first)


def test_the_interval_is_students() -> None:
    assert interval([1.0]) == "+1.00"
    assert interval([1.0, 2.0, 3.0]) == "+2.00 ± 2.48"
