"""A side that gives other outputs each time has no verdict, and its first such module is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orepa_compiler.errors import NoVerdict
from orepa_compiler.verification import judge, take_samples, verify_callables
from tests.verification_nets import X, folded, net


class Noisy(nn.Module):
    """Adds noise in every mode."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * torch.randn_like(x)


class Always(nn.Module):
    """Dropout as a function that forgets the mode, around children that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(net()[:3], nn.Flatten()), nn.Linear(384, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.dropout(self.body(x), 0.5, training=True))


class Counts(nn.Module):
    """A forward that keeps something from call to call, in a buffer and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        return x * (1 + self.calls)


def with_noise(size: float) -> nn.Sequential:
    layers = list(net())
    return nn.Sequential(*layers[:4], Noisy(size), *layers[4:]).eval()


def test_a_noisy_reference_lets_no_wrong_weights_pass() -> None:
    wrong = folded(net())
    with torch.no_grad():
        wrong[0].weight *= 1.05
    message = (
        r"the reference, called twice .* the first module that does so is 4 \(Noisy\)\. Switch"
    )
    for candidate in (wrong, folded(net())):
        with pytest.raises(NoVerdict, match=message):
            verify_callables(with_noise(0.003), candidate, X)


def test_what_a_module_draws_itself_is_laid_at_its_own_door() -> None:
    message = r"the first module that does so is the model itself \(Always\)"
    with pytest.raises(NoVerdict, match=message):
        verify_callables(Always().eval(), net(2), X)


def test_a_random_candidate_has_no_verdict_either() -> None:
    with pytest.raises(NoVerdict, match=r"the candidate, called twice .* is 4 \(Noisy\)"):
        verify_callables(net(), with_noise(0.003), X)
    samples = take_samples(net(), X)
    drawn = torch.Generator()  # net() seeds the one that all share
    with pytest.raises(NoVerdict, match=r"gives other outputs \(output differs by \d"):
        judge(samples, lambda x: net()(x) + 0.01 * torch.rand(4, 5, generator=drawn))
    sizes = iter([1, 2, 3])
    with pytest.raises(NoVerdict, match=r"output has shape \(1, 5\), then \(2, 5\)"):
        judge(samples, lambda x: net()(x)[: next(sizes)])


def test_a_forward_that_changes_with_each_call_has_no_verdict_and_is_left_as_it_was() -> None:
    model = Counts()
    with pytest.raises(NoVerdict, match=r"is the model itself \(Counts\)"):
        verify_callables(model, Counts(), X)
    assert (float(model.calls), model.seen) == (0.0, 0)


def test_a_mask_that_flickers_has_no_verdict() -> None:
    def flickers(x: Tensor) -> dict[str, Any]:
        return {"mask": x + torch.randn_like(x) > 0}

    with pytest.raises(NoVerdict, match=r"mask differs in \d+ of 768 values"):
        verify_callables(flickers, flickers, X)


def test_rounding_in_another_order_is_no_randomness() -> None:
    signs = iter([1.0, -1.0] * 9)

    def unsteady(x: Tensor) -> Tensor:  # as a sum of atomics on a GPU
        return net()(x) * (1 + next(signs) * 2**-23)

    assert verify_callables(net(), unsteady, X)


def test_nan_twice_is_told_as_nan() -> None:
    report = verify_callables(net(), lambda x: net()(x) * float("nan"), X)
    assert "the candidate is not finite" in report.verdict
