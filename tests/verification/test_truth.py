"""What is held to be right, and how the noise of a precision is measured."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.verification import NOISE_FACTOR, truth, verify_callables
from orepa_compiler.verification.outputs import rounding
from tests.norms import randomise_norms
from tests.verification_nets import Returning, X, folded, fuse, net, only_row, reasons


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_judged_by_its_own_noise(precision: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    half = folded(net()).to(dtype)
    report = verify_callables(net(), half, X, precision=precision)
    assert report, str(report)
    eps = torch.finfo(dtype).eps
    assert eps <= report.rows[0].tolerance < 20 * eps
    assert verify_callables(net(), lambda x: half(x).float(), X, precision=precision)
    assert not verify_callables(net(), lambda x: half(x.to(dtype)).float(), X)
    wrong = folded(net())
    nn.init.zeros_(wrong[0].bias)
    assert "is above the tolerance" in reasons(
        verify_callables(net(), wrong.to(dtype), X, precision=precision)
    )
    other = {"fp16": torch.bfloat16, "bf16": torch.float16}[precision]
    assert "is due" in reasons(
        verify_callables(net(), folded(net()).to(other), X, precision=precision)
    )


def test_an_overflow_in_half_precision_names_the_module() -> None:
    model = net()
    with torch.no_grad():
        model[1].weight.mul_(1e6)
    text = reasons(verify_callables(model, lambda x: model(x.float()), X, precision="fp16"))
    assert "the truth in float16 is not finite" in text
    assert "first not finite: 1 (BatchNorm2d; its weight holds NaN or inf)" in text
    assert verify_callables(model, folded(model), X)


def test_float64_is_judged_by_the_noise_of_float64() -> None:
    model = net().double()
    row = only_row(verify_callables(model, folded(net().double()).double(), X.double()))
    assert "is above the tolerance" in row.reason  # folded() casts to float32
    assert 1e-16 < row.tolerance < 1e-14
    assert verify_callables(
        model, deepcopy(model).to(memory_format=torch.channels_last), X.double()
    )


def test_functions_are_compared_without_float64_and_the_report_says_so() -> None:
    model, other = net(), folded(net())
    report = verify_callables(lambda x: model(x), lambda x: other(x), X)
    assert report
    assert report.rows[0].noise is None
    assert report.rows[0].tolerance == NOISE_FACTOR * rounding.UNMEASURED_NOISE[torch.float32]
    assert (
        "no module to evaluate in float64: the reference's own outputs are the truth"
        in (report.notes[0])
    )
    with_truth = verify_callables(lambda x: model(x), lambda x: other(x), X, truth=model)
    assert with_truth
    assert with_truth.rows[0].tolerance < report.rows[0].tolerance


def test_a_reference_off_the_truth_fails() -> None:
    model, other = net().train(), net()
    assert verify_callables(other, folded(net()), X, truth=model)
    assert model[1].training
    with torch.no_grad():
        other[5].bias.add_(0.01)
    text = reasons(verify_callables(other, net(), X, truth=net()))
    assert "the reference itself is " in text
    assert "from the truth, above the tolerance" in text
    message = "the truth returns output_0, output_1, the reference output; give a truth with"
    with pytest.raises(ReparamError, match=message):
        verify_callables(net(), net(), X, truth=Returning(lambda f, s: (f, s)))


def test_a_truth_that_casts_inside_is_noted() -> None:
    model = Returning(lambda f, s: s.float())
    notes = verify_callables(model, deepcopy(model), X).notes
    assert "the truth of output came back as float32: the model casts inside" in notes


def test_a_model_that_does_not_run_in_float64_is_told_what_to_do() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, torch.ones(1, 3, 1, 1))

    message = "the truth in float64 raised at batch 0, .* give truth=, a module that runs in it, or"
    with pytest.raises(ReparamError, match=message):
        verify_callables(Fixed(), Fixed(), X)
    assert verify_callables(Fixed().forward, Fixed(), X)

    class Uncopied(nn.Identity):
        def __deepcopy__(self, memo: dict[int, Any]) -> None:
            raise TypeError("holds a lock")

    message = "the reference cannot be copied: TypeError: holds a lock; the truth is evaluated in"
    with pytest.raises(ReparamError, match=message):
        verify_callables(Uncopied(), nn.Identity(), X)


def test_small_outputs_are_measured_often_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts() -> list[bool]:
        found = []
        for seed in (6, 12, 13):  # where the one float32 output is right by luck
            torch.manual_seed(seed)
            widths = [(3, 16), (16, 16), (16, 16), (16, 16)]
            body = [conv_norm(*width) for width in widths]
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1)]
            model = randomise_norms(nn.Sequential(*body, *head).eval())
            other = fuse(deepcopy(model).double()).float()
            found.append(bool(verify_callables(model, other, torch.randn(1, 3, 8, 8))))
        return found

    assert all(verdicts())
    monkeypatch.setattr(truth, "LEAST_ERRORS", 1)
    monkeypatch.setattr(truth, "LEAST_ROUNDINGS", 0)
    assert not any(verdicts())


def conv_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())
