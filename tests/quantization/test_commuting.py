"""What is trained is what is deployed: rounding commutes with a factor for each output channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

ZEROS = torch.zeros(16).int()


def rounded(kernel: Tensor, steps: Tensor, points: Tensor = ZEROS, low: int = -127) -> Tensor:
    """torch's own rounding, by output channel."""
    return torch.fake_quantize_per_channel_affine(kernel, steps, points, 0, low, 127)


def kernel_and_factor() -> tuple[Tensor, Tensor, Tensor]:
    """A kernel, the steps that fit it, and the factors of a norm: both signs, great and small."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(16, 8, 3, 3, generator=generator)
    factor = torch.randn(16, generator=generator) * torch.logspace(-4, 4, 16)
    return kernel, kernel.flatten(1).abs().amax(1) / 127, factor


def test_a_factor_for_each_channel_may_come_before_or_behind() -> None:
    kernel, steps, factor = kernel_and_factor()
    by_channel = factor.reshape(-1, 1, 1, 1)
    before = rounded(by_channel * kernel, factor.abs() * steps)
    behind = by_channel * rounded(kernel, steps)
    torch.testing.assert_close(before, behind, rtol=1e-5, atol=0)
    # it does round: the claim is not that both are the kernel
    assert (behind - by_channel * kernel).abs().max() > 1e-3 * behind.abs().max()


def test_with_a_power_of_two_it_is_exact() -> None:
    kernel, steps, factor = kernel_and_factor()
    factor = factor.sign() * 2.0 ** factor.abs().log2().round()
    by_channel = factor.reshape(-1, 1, 1, 1)
    before = rounded(by_channel * kernel, factor.abs() * steps)
    assert torch.equal(before, by_channel * rounded(kernel, steps))


def test_a_clamp_that_is_not_symmetric_does_not_commute_with_a_sign() -> None:
    kernel, steps, _ = kernel_and_factor()
    cut = steps * 0.5  # so that values are clamped
    assert torch.equal(rounded(-kernel, cut), -rounded(kernel, cut))
    assert not torch.equal(rounded(-kernel, cut, low=-128), -rounded(kernel, cut, low=-128))


def test_a_zero_point_does_not_commute_with_a_sign() -> None:
    kernel, steps, _ = kernel_and_factor()
    points = torch.full((16,), 5).int()
    assert not torch.equal(rounded(-kernel, steps, points), -rounded(kernel, steps, points))


def test_a_factor_of_zero_has_no_step_of_its_own() -> None:
    kernel, steps, _ = kernel_and_factor()
    by_channel = (0 * steps).reshape(-1, 1, 1, 1)
    assert (0 * kernel / by_channel).isnan().all()  # which integer it is, nothing says
    assert torch.equal(rounded(0 * kernel, steps), 0 * kernel)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_factor_for_each_input_channel_commutes_with_nothing(axis: int) -> None:
    kernel, steps, factor = kernel_and_factor()
    by_axis = factor.reshape(-1, 1, 1, 1) if axis == 0 else factor[:8].reshape(1, -1, 1, 1)
    own = (by_axis * kernel).flatten(1).abs().amax(1) / 127
    agrees = torch.allclose(rounded(by_axis * kernel, own), by_axis * rounded(kernel, steps), 1e-4)
    assert agrees == (axis == 0)
