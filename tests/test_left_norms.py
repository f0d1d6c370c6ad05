"""What collapse says of norms that stay behind convs: which, why, and whether inputs help."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import orepa_compiler as orepa


class Steered(nn.Module):
    """A forward whose values say where it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return y + 1 if y.sum() > 0 else y


def test_collapse_warns_of_norms_that_stay_and_says_whether_inputs_help() -> None:
    with pytest.warns(orepa.NormsLeftWarning) as told:
        orepa.collapse(Steered())
    assert str(told[0].message).startswith("1 norm stays behind convs: norm (the forward of the m")
    assert str(told[0].message).endswith("; inputs= may help: real calls are then recorded")
    assert told[0].filename == __file__
    with pytest.warns(orepa.NormsLeftWarning, match="may go another way.*; inputs= does not help"):
        orepa.collapse(Steered(), inputs=torch.randn(2, 3, 8, 8))


def test_it_says_nothing_of_norms_that_no_conv_feeds_or_that_are_kept() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        orepa.collapse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)))
        orepa.collapse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        orepa.collapse(Steered(), fold_norm=False)


def test_the_first_ones_are_named() -> None:
    with pytest.warns(orepa.NormsLeftWarning, match="4 norms stay behind convs: 0.norm, 1.norm, 2"):
        orepa.collapse(nn.Sequential(*(Wide() for _ in range(4))))


class Wide(Steered):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
