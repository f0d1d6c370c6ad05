"""The assertion for users' own tests: what it returns, and how it reads when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.testing import assert_equivalent
from tests.norms import randomise_norms

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    return randomise_norms(nn.Sequential(*layers)).eval()


def test_it_returns_the_report(model: nn.Module) -> None:
    report = assert_equivalent(model, orepa.collapse(model), X)
    assert report
    assert len(report.rows) == 5
    assert len(assert_equivalent(model, orepa.collapse(model), X, stress=False).rows) == 1


def test_it_says_what_where_and_draws_it(model: nn.Module) -> None:
    deploy = orepa.collapse(model)
    with torch.no_grad():
        deploy[0].bias.zero_()
    with pytest.raises(AssertionError) as error:
        assert_equivalent(model, deploy, X)
    text = str(error.value)
    assert text.startswith("FAIL: 5 of 5 rows; batch ")
    assert "\nfirst diverging module: 0 (Conv2d + BatchNorm2d): error " in text
    assert text.splitlines()[-1] == "+---------+"


def test_files_are_taken_by_their_paths(model: nn.Module, tmp_path: Path) -> None:
    path = orepa.export_onnx(orepa.collapse(model), X, tmp_path / "net.onnx")
    assert assert_equivalent(model, path, X)
    assert assert_equivalent(model, str(path), X)
    model[3].bias.data += 1
    with pytest.raises(AssertionError, match=r"first diverging module: 3 \(Conv2d\)"):
        assert_equivalent(model, path, X)


def test_what_cannot_be_compared_is_no_pass(model: nn.Module) -> None:
    with pytest.raises(AssertionError, match="no inputs were given"):
        assert_equivalent(model, model, [])
    with pytest.raises(orepa.ReparamError, match="the candidate raised at batch 0"):
        assert_equivalent(model, nn.Conv2d(4, 4, 1), X)
