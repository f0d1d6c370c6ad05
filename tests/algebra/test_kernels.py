"""Kernels on a lattice of taps, against sums written out by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from orepa_compiler.algebra.kernels import convolve, pad, place, spread
from tests.convolution_reference import assert_same
from tests.operator_factories import random_tensor


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1)


def test_spread_puts_zeros_between_the_taps() -> None:
    assert torch.equal(spread(row(1, 2, 3), [2]), row(1, 0, 2, 0, 3))
    assert torch.equal(spread(row(1, 2), [4]), row(1, 0, 0, 0, 2))
    assert torch.equal(spread(row(1, 2), [1]), row(1, 2))
    assert torch.equal(spread(row(1), [5]), row(1))


def test_spread_takes_each_axis_by_itself() -> None:
    weight = random_tensor(3, 2, 2, 3)
    wide = spread(weight, [3, 2])
    assert wide.shape == (3, 2, 4, 5)
    assert torch.equal(wide[:, :, ::3, ::2], weight)
    assert wide.count_nonzero() == weight.count_nonzero()


def test_place_puts_the_first_tap_at_the_offset() -> None:
    expected = row(0, 1, 0, 2, 0, 0)
    assert torch.equal(place(row(1, 2), counts=[6], offsets=[1], spacings=[2]), expected)
    weight = random_tensor(3, 2, 2, 1)
    placed = place(weight, counts=[5, 3], offsets=[2, 1], spacings=[2, 1])
    assert placed.shape == (3, 2, 5, 3)
    assert torch.equal(placed[:, :, 2::2, 1:2], weight)
    assert placed.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize("k2", [(1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("k1", [(1, 1), (2, 3), (1, 2)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_convolve_is_the_double_sum(blocks: int, k1: tuple[int, int], k2: tuple[int, int]) -> None:
    outer, inner = random_tensor(blocks, 4, 2, *k2), random_tensor(blocks, 2, 5, *k1, seed=1)
    expected = torch.zeros(blocks, 4, 5, *(a + b - 1 for a, b in zip(k1, k2, strict=True)))
    expected = expected.double()
    for i, j, m, n in product(*map(range, (*k2, *k1))):
        expected[..., i + m, j + n] += outer[..., i, j] @ inner[..., m, n]
    assert_same(convolve(outer, inner), expected)


def test_convolve_without_kernel_axes_is_a_matrix_product() -> None:
    outer, inner = random_tensor(3, 4, 2), random_tensor(3, 2, 5, seed=1)
    assert_same(convolve(outer, inner), outer @ inner)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("zeros", row(0, 0, 1, 2, 3)),
        ("reflect", row(3, 2, 1, 2, 3)),
        ("replicate", row(1, 1, 1, 2, 3)),
        ("circular", row(3, 4, 1, 2, 3)),
    ],
)
def test_pad_grows_and_then_crops(mode: str, expected: Tensor) -> None:
    assert torch.equal(pad(row(1, 2, 3, 4), [(2, -1)], mode), expected)


def test_pad_takes_the_axes_in_order() -> None:
    x = random_tensor(1, 1, 4, 5)
    assert pad(x, [(1, 2), (0, -3)], "zeros").shape == (1, 1, 7, 2)
    assert torch.equal(pad(x, [(1, 2), (0, -3)], "zeros")[:, :, 1:5], x[..., :2])
    assert pad(x, [(0, 0), (0, 0)], "reflect") is x
