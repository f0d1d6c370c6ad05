"""The noise of weights that are rounded anew, and of sums that begin elsewhere than at 0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orepa_compiler.verification import verify_callables
from orepa_compiler.verification.summation import FoldedSums
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
        with FoldedSums():
            other = model(x)
            # Only what stands right behind a conv, in eval mode, and in a wide type.
            behind = model.get_submodule("1")(plain.relu())
            assert torch.equal(behind, F.batch_norm(plain.relu(), *stats(model)))  # type: ignore[arg-type]
        assert not torch.equal(plain, other)
        assert torch.allclose(one, other, atol=1e-5)
        assert torch.allclose(plain, other, atol=1e-5)
        small, half = x.bfloat16(), model.bfloat16()
        right = half(small)
        with FoldedSums():
            assert torch.equal(half(small), right)
    layers = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6, affine=False)
    flat = nn.Sequential(*layers).double().eval()
    randomise_norms(flat)
    y = torch.randn(2, 4, 9).double()
    right = flat(y)
    with FoldedSums(), torch.no_grad():
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
