"""The noise of weights that are rounded anew, and of sums that begin elsewhere than at 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orepa_compiler.verification import verify_callables
from orepa_compiler.verification.summation import OtherSums
from orepa_compiler.verification.truth import _noisy_sides
from tests.norms import randomise_norms


def long_sum(seed: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """A conv of 1152 terms and a norm; the same folded in float64; and their input."""
    torch.manual_seed(seed)
    conv, norm = nn.Conv2d(128, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64)
    nn.init.uniform_(norm.running_mean, -3, 3)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.05, 0.5)  # type: ignore[arg-type]
    model = nn.Sequential(conv, norm).eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    folded = nn.Conv2d(128, 64, 3, stride=2, padding=1)
    with torch.no_grad():
        folded.weight.copy_(conv.weight.double() * scale.reshape(-1, 1, 1, 1))
        assert folded.bias is not None
        folded.bias.copy_(norm.bias.double() - norm.running_mean.double() * scale)
    return model, folded, 0.1 * torch.randn(1, 128, 4, 4)


class OneByOne(nn.Module):
    """A conv that adds up its terms one by one, from its bias on: some kernels do."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        terms = F.unfold(x, 3, padding=1, stride=2)
        weight = self.conv.weight.flatten(1)
        assert self.conv.bias is not None
        total = self.conv.bias[:, None].expand(-1, terms.shape[2]).clone()
        for index in range(terms.shape[1]):
            total = total + weight[:, index : index + 1] * terms[0, index][None]
        return total.reshape(1, -1, 2, 2)


@pytest.mark.parametrize("seed", range(6))
def test_a_folded_conv_may_add_up_from_its_bias(seed: int) -> None:
    model, folded, x = long_sum(seed)
    assert isinstance(folded, nn.Conv2d)
    for candidate in (folded, OneByOne(folded)):
        report = verify_callables(model, candidate, x)
        assert report, report
    with torch.no_grad():
        folded.weight[0, 0, 1, 1] += 0.01
    assert not verify_callables(model, folded, x)


def test_a_norm_behind_a_conv_is_added_up_as_one() -> None:
    model, folded, x = long_sum(0)
    with torch.no_grad():
        plain, one = model(x), folded(x)
        with OtherSums():
            other = model(x)
            # Only what stands right behind a conv, in eval mode, and in a wide type.
            behind = model.get_submodule("1")(plain.relu())
            assert torch.equal(behind, F.batch_norm(plain.relu(), *stats(model)))  # type: ignore[arg-type]
        assert not torch.equal(plain, other)
        assert torch.allclose(one, other, atol=1e-5)
        assert torch.allclose(plain, other, atol=1e-5)
        small, half = x.bfloat16(), model.bfloat16()
        right = half(small)
        with OtherSums():
            assert torch.equal(half(small), right)
    layers = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6, affine=False)
    flat = nn.Sequential(*layers).double().eval()
    randomise_norms(flat)
    y = torch.randn(2, 4, 9).double()
    right = flat(y)
    with OtherSums(), torch.no_grad():
        assert torch.allclose(flat(y), right, rtol=1e-12)
        assert not torch.equal(flat(y), right)
        flat[1].train()
        trained = flat(y)
    assert torch.allclose(trained.mean((0, 2)), torch.zeros(6).double(), atol=1e-12)


def stats(model: nn.Module) -> tuple[Tensor, ...]:
    norm = model.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    return norm.running_mean, norm.running_var, norm.weight, norm.bias  # type: ignore[return-value]


def test_the_statistics_of_a_norm_are_rounded_anew_too() -> None:
    model, _, _ = long_sum(0)
    right = [buffer.clone() for buffer in model.buffers()]
    (side,) = _noisy_sides(model, model.double(), torch.float32, 1, is_first=False)
    assert isinstance(side.run, nn.Module)
    eps = torch.finfo(torch.float32).eps
    for before, after in zip(right, side.run.buffers(), strict=True):
        if before.is_floating_point():
            assert not torch.equal(before, after)
            assert torch.allclose(before, after, rtol=eps, atol=0)


# Means over maps


class Mean(nn.Module):
    """A mean over a map, times 1 + wrong."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * (1 + self.wrong)


class PlaceByPlace(Mean):
    """A mean that adds up eight places at a time, as a loop over vectors does."""

    def forward(self, x: Tensor) -> Tensor:
        total, *parts = x.flatten(2).split(8, -1)
        for part in parts:
            total = total + part
        return total.sum(-1) / x[0, 0].numel()


@pytest.mark.parametrize("pool", [Mean(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())])
def test_a_mean_may_be_added_up_place_by_place(pool: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), pool).eval()
    x = torch.full((2, 3, 96, 96), 0.7)
    right = nn.Sequential(*model[:2], PlaceByPlace())
    report = verify_callables(model, right, x)
    assert report, report
    assert not verify_callables(model, nn.Sequential(*model[:2], Mean(wrong=3e-4)), x)


@pytest.mark.parametrize(
    "mean",
    [
        lambda x: x.mean(),
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=(-1, -2), keepdim=True),
        lambda x: torch.mean(x, (1, 3)),
        lambda x: x.mean(-2, keepdim=True),
        lambda x: x.mean(dim=0),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
        lambda x: F.adaptive_avg_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x[0], 1),
        lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1),
        lambda x: F.adaptive_avg_pool3d(x[None], 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mean_in_another_order_is_the_same_mean(mean: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 4, 65, 9).to(dtype)
    with OtherSums():
        found = mean(x)
    right = mean(x)
    assert (found.shape, found.dtype) == (right.shape, right.dtype)
    torch.testing.assert_close(found, right, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_means_of_many_terms_are_rounded_otherwise_and_of_few_alike() -> None:
    x = torch.full((1, 2, 100, 100), 0.7)
    with OtherSums():
        many, few = x.mean((2, 3)), x[..., :8, :8].mean((2, 3))
    assert (many - 0.7).abs().min() > 10 * (x.mean((2, 3)) - 0.7).abs().max()
    assert torch.equal(few, x[..., :8, :8].mean((2, 3)))
