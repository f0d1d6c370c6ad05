"""How far off one output is, and what is too far."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler.verification import verify_callables
from orepa_compiler.verification.outputs import rounding
from tests.verification_nets import Returning, X, changed, folded, net, only_row, reasons


def test_the_error_is_measured_against_the_float64_reference() -> None:
    model, other = net(), folded(net())
    right = deepcopy(model).double()(X.double()).detach()
    error = (other(X).detach().double() - right).abs().max() / right.abs().max()
    row = only_row(verify_callables(model, other, X))
    assert row.error == pytest.approx(float(error), rel=1e-12)


def test_top1_fails_where_the_margin_is_no_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    # Below the tolerance of 4 x 2e-6 for a function, twice that apart, and exactly apart.
    right[0, 1], right[1, 0] = 1 - 12e-6, 1 - 4e-6
    other = right.clone()
    other[0] += torch.tensor([-6.5e-6, 6.5e-6])
    other[1] += torch.tensor([3e-6, -3e-6])
    other[2] += torch.tensor([-1e-6, 1e-6])
    row = only_row(verify_callables(lambda x: right, lambda x: other, X))
    assert row.error < row.tolerance
    assert row.top1 == pytest.approx(1 / 3)
    assert "top-1 agrees at 33.33% of the positions, and these are no ties: the truth's" in (
        row.reason
    )
    row = only_row(verify_callables(lambda x: right[1:], lambda x: other[1:], X))
    assert row.ok
    assert row.top1 == 0.5


def test_top1_is_taken_along_axis_1_where_it_has_two_entries() -> None:
    tops = [
        only_row(
            verify_callables(lambda x, s=s: torch.ones(s), lambda x, s=s: torch.ones(s), X)
        ).top1
        for s in ((3,), (3, 1), (3, 2), (2, 3, 4, 4))
    ]
    assert tops == [None, None, 1.0, 1.0]


def test_integer_outputs_must_be_equal() -> None:
    labels = Returning(lambda f, s: f.argmax(1))
    row = only_row(verify_callables(labels, deepcopy(labels), X))
    assert (row.ok, row.dtype, row.error, row.tolerance) == (True, "int64", 0.0, 0.0)
    row = only_row(verify_callables(labels, Returning(lambda f, s: f.argmax(1).roll(1)), X))
    assert not row.ok
    assert row.error > 0.5
    assert "values differ where the reference decides clearly; at (" in row.reason


def test_plain_numbers_and_complex_outputs_are_compared() -> None:
    model = Returning(
        lambda f, s: {"count": 3, "mean": float(s.mean()), "fourier": torch.fft.fft(s)}
    )
    other = Returning(
        lambda f, s: {"count": 4, "mean": float(s.mean()), "fourier": torch.fft.fft(s)}
    )
    assert verify_callables(model, deepcopy(model), X)
    text = reasons(verify_callables(model, other, X))
    assert text.startswith(
        "count: 1 of 1 values differ where the reference decides clearly; at (): 4, "
    )
    turned = Returning(lambda f, s: {"count": 3, "mean": 0.0, "fourier": 1j * torch.fft.fft(s)})
    text = reasons(verify_callables(model, turned, X))
    assert "mean: error 1.0e+00" in text
    assert "fourier: error 1.4e+00" in text


def test_a_shape_that_rounding_decides_is_no_pass() -> None:
    class Selecting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > (0 if x.dtype == torch.float64 else 1)]

    text = reasons(verify_callables(Selecting(), Selecting(), X))
    assert "when the same model runs in another precision: what rounding decides cannot" in text


def test_noise_as_large_as_the_output_is_no_pass() -> None:
    class Cancelling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1e7) - 1e7

    text = reasons(verify_callables(Cancelling(), Cancelling(), X))
    assert "the reference's own error in float32 is " in text
    assert "above 0.1: no verdict; compare in a higher precision or on more inputs" in text


def test_the_tolerance_never_reaches_the_size_of_the_output() -> None:
    row = only_row(verify_callables(net(), folded(net()), X, factor=1e9))
    assert row.tolerance == rounding.MAX_TOLERANCE
    assert not verify_callables(net(), changed(lambda y: y * 0), X, factor=1e9)


def test_an_output_of_zeros_must_be_zero_exactly() -> None:
    zeros = Returning(lambda f, s: s * 0)
    report = verify_callables(zeros, deepcopy(zeros), X)
    assert report
    assert "output is 0 everywhere in the truth: nothing else was compared" in report.notes
    assert "is above the tolerance 0.0e+00" in reasons(
        verify_callables(zeros, Returning(lambda f, s: s * 0 + torch.full((), 1e-9)), X)
    )


def test_a_reference_without_noise_leaves_room_for_one_rounding() -> None:
    row = only_row(verify_callables(nn.Identity(), lambda x: x * 3 / 3, X))
    assert row.ok
    assert row.noise == 0
    assert 0 < row.error < row.tolerance == 4 * 2**-23
    assert not verify_callables(nn.Identity(), lambda x: x * (1 + 8 * 2**-23), X)
