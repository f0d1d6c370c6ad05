"""The benchmark over libraries: its catalogue, its page; no library is needed for these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.libraries import examining
from benchmarks.libraries.catalogue import Entry, entries, outputs_of
from benchmarks.libraries.report import section, with_section
from benchmarks.zoo.building import Subject
from benchmarks.zoo.examining import Limits


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def row_of(monkeypatch: Any, place: str) -> dict[str, Any]:
    entry = Entry("here", "small", place)
    monkeypatch.setattr(examining, "entries", lambda: {"here:small": entry})
    return examining.examine(Subject("here", "small", "here"), Limits(60, 1e9), exports=False)


def test_every_model_has_a_name_of_its_own_and_inputs() -> None:
    found = entries()
    assert len(found) > 60
    assert all(isinstance(entry.inputs(), tuple) for entry in found.values())


def test_a_row(monkeypatch: Any) -> None:
    row = row_of(monkeypatch, f"{__name__}.small")
    assert row["status"] == "pass"
    assert (row["spatial"], row["plan"]["spatial_expanded"]) == (1, 1)
    assert (row["norms_behind_conv"], row["norms_left"]) == (1, [])


def test_what_cannot_be_made_is_a_row_too(monkeypatch: Any) -> None:
    row = row_of(monkeypatch, f"{__name__}.missing")
    assert row["status"] == "error"
    assert "missing" in row["why"]


def test_the_section_takes_the_place_of_an_earlier_one(monkeypatch: Any, tmp_path: Path) -> None:
    row = row_of(monkeypatch, f"{__name__}.small")
    assert "| here | 1 | 1 | 0 | 1 | 1 (100 %) | 1 | 0 | 0 of 0 |" in section([row], {})
    results = tmp_path / "libraries.json"
    results.write_text(json.dumps({"environment": {}, "rows": [row]}))
    page = with_section("# The zoo\n", results)
    assert page.startswith("# The zoo\n\n## Beyond timm and torchvision")
    assert with_section(page, results) == page
    assert with_section(page, tmp_path / "none.json") == "# The zoo\n"


def test_outputs_are_found_in_what_holds_them() -> None:
    one = torch.ones(1)
    assert outputs_of({"a": one, "b": (one, [one])}) == [one, one, one]


class WritesOverItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x *= 255
        return self.conv(x).relu()


def test_each_call_is_given_new_inputs(monkeypatch: Any) -> None:
    row = row_of(monkeypatch, f"{__name__}.WritesOverItsInput")
    assert row["status"] == "pass", row
