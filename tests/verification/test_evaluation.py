"""Running a side: what it is given, what is refused, what is left untouched, where NaN begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from orepa_compiler.errors import ReparamError
from orepa_compiler.verification import verify_callables
from tests.verification_nets import X, changed, folded, net, poke, reasons


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X}, "inputs: batch 0 is a dict; give a tensor, a tuple of positional arguments"),
        ([X, [X]], "inputs: batch 1 is a list; give a tensor"),
        (X.numpy(), "inputs: batch 0 is a numpy.ndarray; give a tensor"),
        ((X.numpy(),), "inputs: batch 0 holds a numpy.ndarray; arguments are torch tensors"),
        ((X, object()), "inputs: batch 0 holds a object; arguments are torch tensors and plain"),
        (X.to("meta"), "no values to compare; batch 0 of the inputs is on the meta device"),
    ],
)
def test_wrong_inputs_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ReparamError, match=message):
        verify_callables(net(), net(), inputs)


def test_inputs_on_another_device_are_refused() -> None:
    with FakeTensorMode():
        x = torch.empty(1, 3, 8, 8, device="cuda")
    message = "the reference is on cpu, but batch 0 of the inputs holds a tensor on cuda:0; move"
    with pytest.raises(ReparamError, match=message):
        verify_callables(net(), net(), x)


def test_a_side_that_raises_is_named_with_its_batch_and_shapes() -> None:
    narrow = nn.Sequential(nn.Conv2d(1, 5, 1))
    sizes = r"at batch 1, inputs \(4, 3, 8, 8\) float32: RuntimeError: .*channels"
    with pytest.raises(ReparamError, match=f"the candidate raised {sizes}"):
        verify_callables(lambda x: x, narrow, [X[:, :1], X])
    with pytest.raises(ReparamError, match=f"the reference raised {sizes}"):
        verify_callables(narrow, nn.Identity(), [X[:, :1], X])
    with pytest.raises(ReparamError, match=r"two outputs are called a\.b; rename"):
        verify_callables(net(), lambda x: {"a": {"b": x}, "a.b": x}, X)


def test_modules_are_left_as_they_were() -> None:
    model, other = net().train(), folded(net())
    model[2].eval()
    other[2].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = verify_callables(model, other, X)
    assert report, str(report)
    assert report.notes == (
        "the reference had 6 of 7 modules in train mode; it was compared in eval mode",
        "the candidate had 1 of 6 modules in train mode; it was compared in eval mode",
    )
    assert [m.training for m in model.modules()] == [True, True, True, False, True, True, True]
    assert [m.training for m in other.modules()] == [False, False, False, True, False, False]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_come_back_after_an_exception() -> None:
    model = nn.Conv2d(1, 1, 1)
    with pytest.raises(ReparamError, match="the reference raised"):
        verify_callables(model, model, X)
    assert model.training
    assert verify_callables(model, model, X[:, :1])


def test_inputs_changed_in_place_and_reused_outputs_do_no_harm() -> None:
    first = nn.Sequential(nn.ReLU(inplace=True), net())
    second = nn.Sequential(nn.ReLU(), net())
    x = X.clone()
    assert verify_callables(first, second, x)
    assert torch.equal(x, X)

    memory = torch.empty(4, 5)

    def session(x: Tensor) -> Tensor:
        return memory.copy_(net()(x).detach())

    assert verify_callables(net(), session, [X, X.flip(0), -X])


def test_a_reference_that_is_not_finite_fails_too() -> None:
    spoilt = changed(poke(float("nan")))
    assert "the reference is not finite: 1 NaN in 20 values" in reasons(
        verify_callables(spoilt, spoilt, X)
    )


def test_the_first_module_that_is_not_finite_is_named() -> None:
    model = net()
    model[1].running_var[2] = float("nan")
    for pair, role in (((model, net()), "reference"), ((net(), model), "candidate")):
        text = reasons(verify_callables(*pair, X))
        assert f"the {role} is not finite: 20 NaN in 20 values" in text
        assert "first not finite: 1 (BatchNorm2d; its running_var holds NaN or inf)" in text
    assert not any(module._forward_hooks for module in model.modules())


def test_a_division_by_zero_is_found_though_all_weights_are_finite() -> None:
    class Normalised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.sum(1, keepdim=True)

    model = nn.Sequential(net(), nn.Sequential(nn.ReLU(), Normalised()))
    with torch.no_grad():
        model[0][5].bias.fill_(-9)
    text = reasons(verify_callables(net(), model, X))
    assert "first not finite: 1.1 (Normalised; its inputs are finite)" in text


def test_weights_spoilt_in_place_and_spoilt_inputs_are_named() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(float("inf")))

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(self.gain)

    text = reasons(verify_callables(net(), nn.Sequential(net(), InPlace()), X))
    assert "first not finite: 1 (InPlace; its gain holds NaN or inf)" in text
    text = reasons(verify_callables(net(), net(), X.clone().fill_(float("inf"))))
    assert "first not finite: the inputs already hold NaN or inf" in text


def test_a_module_that_passes_nan_on_is_not_blamed() -> None:
    class Dividing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.after = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.after(x / torch.zeros(()))

    text = reasons(verify_callables(net(), nn.Sequential(net(), Dividing()), X))
    assert "first not finite: 1 (Dividing; its inputs are finite)" in text
