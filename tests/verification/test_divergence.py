"""The first module that is wrong, where on its map, and the picture of it."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from torch import Tensor

from orepa_compiler.verification.divergence import (
    MAP_COLUMNS,
    MAP_ROWS,
    Tap,
    first_divergence,
    half_blocks,
    plain_map,
)

TRUTH = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)).double()


def tap(path: str = "conv", change: object = None, truth: Tensor = TRUTH) -> Tap:
    found = truth.float()
    if change is not None:
        found = change(found.clone())  # type: ignore[operator]
    return Tap(path, "Conv2d", truth, truth.float(), found)


def poke(*index: int, by: float = 1.0) -> object:
    def change(values: Tensor) -> Tensor:
        values[index] += by
        return values

    return change


def test_the_first_of_several_is_named_and_the_ones_before_are_counted() -> None:
    taps = [tap("a"), tap("b"), tap("c", poke(0, 0, 2, 2)), tap("d", poke(0, 0, 0, 0))]
    found = first_divergence(taps, 4.0)
    assert found is not None
    assert (found.module, found.agreeing, found.shape) == ("c", 2, (2, 3, 6, 8))
    assert first_divergence(taps[:2], 4.0) is None
    assert str(found).startswith("first diverging module: c (Conv2d): error ")
    assert str(found).endswith(". 2 modules before it agree")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ((0, 0, 0, 3), "at the border alone: look at the padding"),
        ((1, 2, 5, 7), "at the border alone: look at the padding"),
        ((0, 0, 2, 3), "in the interior alone"),
    ],
)
def test_border_and_interior_are_told_apart(index: tuple[int, ...], said: str) -> None:
    found = first_divergence([tap("conv", poke(*index))], 4.0)
    assert found is not None
    assert found.border is not None
    assert found.interior is not None
    assert max(found.border, found.interior) == found.error
    assert said in str(found)


def test_an_error_everywhere() -> None:
    found = first_divergence([tap("conv", lambda values: values * 1.1)], 4.0)
    assert "all over the feature map" in str(found)


def test_the_map_has_the_largest_error_of_each_position() -> None:
    found = first_divergence([tap("conv", poke(1, 2, 4, 7, by=-2.0))], 4.0)
    assert found is not None
    assert (len(found.error_map), len(found.error_map[0])) == (6, 8)
    values = torch.tensor(found.error_map)
    assert divmod(int(values.argmax()), 8) == (4, 7)
    assert float(values.max()) == pytest.approx(2 / float(TRUTH.abs().max()), rel=1e-5)


def test_a_large_map_is_made_coarser_and_keeps_its_peak() -> None:
    truth = torch.ones(1, 1, 100, 200).double()
    found = first_divergence([tap("conv", poke(0, 0, 99, 0), truth=truth)], 4.0)
    assert found is not None
    assert (len(found.error_map), len(found.error_map[0])) == (MAP_ROWS, MAP_COLUMNS)
    assert found.error_map[-1][0] == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v[:1], "shape (1, 3, 6, 8), the reference's is (2, 3, 6, 8)"),
        (poke(0, 0, 0, 0, by=float("nan")), "the candidate is not finite: 1 NaN"),
        (poke(0, 0, 2, 2, by=float("inf")), "the candidate is not finite: 1 inf"),
    ],
)
def test_what_cannot_be_measured_diverges_too_and_is_still_json(change: object, said: str) -> None:
    found = first_divergence([tap("a"), tap("conv", change)], 4.0)
    assert found is not None
    assert said in found.reason
    json.dumps(found.to_dict()["error_map"], allow_nan=False)


def test_the_plain_picture() -> None:
    assert plain_map([[0.0, 1.0], [0.05, 0.5]]) == "+--+\n| @|\n|.+|\n+--+"
    assert plain_map([[0.0]]) == "+-+\n| |\n+-+"


def test_half_blocks_take_two_rows_to_a_line() -> None:
    picture = half_blocks([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    assert picture.plain == "▀▀\n▀▀\n"
    assert "color(255) on color(232)" in str(picture.spans)
    page = io.StringIO()
    Console(file=page, force_terminal=True, color_system="256").print(picture)
    assert "\x1b[38;5;255;48;5;232m▀" in page.getvalue()
