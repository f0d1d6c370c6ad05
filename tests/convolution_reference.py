"""The definition of a convolution, tap by tap, and how two results are compared."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from orepa_compiler.algebra.operators import ConvOperator

# Relative to the largest output. float64 rounds at 1e-16 and the sums here have under 1e4 terms.
TOLERANCE = 1e-12
# A wrong border is wrong by the size of a tap.
CLEARLY_WRONG = 1e-4


def reference(op: ConvOperator, x: Tensor) -> Tensor:
    """y_o(m) = b_o + sum_i sum_j W_oi(j) x_i(m stride - before + dilation j), tap by tap.

    It shares no code with the package and none with torch's convolutions. One for maps of several
    ranks is taken for those of x.
    """
    if op.gives.axes.rank is None:
        op = op.with_rank(x.dim() - 2)
    total = 0.0 if op.bias is None else op.bias.reshape(-1, *(1,) * op.rank)
    weight = dense(op)
    for tap in product(*map(range, op.kernel_size)):
        window = x
        for axis, j in enumerate(tap):
            spanned = op.dilation[axis] * (op.kernel_size[axis] - 1) + 1
            before, after = op.padding[axis]
            count = (x.shape[2 + axis] + before + after - spanned) // op.stride[axis] + 1
            places = [m * op.stride[axis] - before + op.dilation[axis] * j for m in range(count)]
            window = _read(window, 2 + axis, places, op.padding_mode)
        matrix = weight.movedim((0, 1), (-2, -1))[tap]
        total = total + torch.einsum("oi,ni...->no...", matrix, window)
    assert isinstance(total, Tensor)
    return total


def dense(op: ConvOperator) -> Tensor:
    """The weight without groups, (C_out, C_in, *kernel)."""
    full = op.weight.new_zeros(op.out_channels, op.in_channels, *op.kernel_size)
    for o in range(op.out_channels):
        first = o // (op.out_channels // op.groups) * op.weight.shape[1]
        full[o, first : first + op.weight.shape[1]] = op.weight[o]
    return full


def _read(x: Tensor, axis: int, places: list[int], mode: str) -> Tensor:
    size = x.shape[axis]
    beyond: dict[str, Callable[[int], int]] = {
        "zeros": lambda i: min(max(i, 0), size - 1),
        "replicate": lambda i: min(max(i, 0), size - 1),
        "circular": lambda i: i % size,
        "reflect": lambda i: abs((i + size - 1) % (2 * size - 2) - (size - 1)),
    }
    values = x.index_select(axis, torch.tensor([beyond[mode](i) for i in places]))
    if mode == "zeros":
        inside = torch.tensor([0 <= i < size for i in places])
        values = values * inside.reshape(-1, *(1,) * (x.dim() - axis - 1))
    return values


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value. None to compare: fails."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    assert expected.numel() > 0
    assert bool(expected.isfinite().all())
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


def assert_same(actual: Tensor, expected: Tensor, *what: object) -> None:
    difference = error(actual, expected)
    assert difference < TOLERANCE, f"relative difference {difference:.1e} {what}"
