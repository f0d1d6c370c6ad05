"""Inserted norms start from the data: eval mode is kept, train mode comes close to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler import OREPA
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.errors import ReparamError
from orepa_compiler.training.calibration import inserted_norms
from tests.compiler_nets import (
    assert_same,
    bare_net,
    batch,
    output,
    stem_net,
    train_a_step,
    untouched,
)

X = batch(16, 12)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_without_inputs_eval_is_kept_and_train_is_not() -> None:
    net = bare_net()
    expanded = orepa.expand(net, block=OREPA)
    assert_same(output(expanded, X), output(net, X))
    assert relative(output(expanded, X, training=True), output(net, X)) > 0.3


def test_with_inputs_both_modes_are_kept() -> None:
    net = bare_net()
    with untouched(net):
        expanded = orepa.expand(net, inputs=X, block=OREPA)
    assert_same(output(expanded, X), output(net, X))
    # the first norm meets in train mode the very statistics that it was given
    assert relative(output(expanded, X, training=True), output(net, X)) < 1e-6
    other = batch(16, 12) + 0.1
    assert_same(output(expanded, other), output(net, other))


@pytest.mark.parametrize("inputs", [X, (X,), [X[:5], (X[5:],)]], ids=["tensor", "tuple", "list"])
def test_the_statistics_are_those_of_all_the_batches(inputs: object) -> None:
    expanded = orepa.expand(bare_net(), inputs=inputs, block=OREPA)
    norm = inserted_norms(expanded)["conv1.norm"]
    y = bare_net()[0](X) - bare_net()[0].bias.reshape(1, -1, 1, 1)  # type: ignore[operator, union-attr]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    variance = y.var((0, 2, 3), correction=0)
    assert_same(norm.running_mean, y.mean((0, 2, 3)).detach(), 1e-10)
    assert_same(norm.running_var, variance.detach(), 1e-10)
    assert_same(norm.weight.detach(), (variance + norm.eps).sqrt().detach(), 1e-10)


def test_a_second_calibration_keeps_the_function() -> None:
    net = bare_net()
    once = orepa.expand(net, where="conv1", inputs=X, block=OREPA)
    twice = orepa.expand(once, inputs=X + 0.5, block=OREPA)
    assert inserted_norms(twice).keys() == {"conv1.norm", "conv2.norm"}
    assert_same(output(twice, X), output(net, X))


def test_a_trained_norm_is_left_as_it_is_by_a_second_expand() -> None:
    model = orepa.expand(bare_net(), where="conv1", inputs=X, block=OREPA)
    train_a_step(model, X)
    again = orepa.expand(model, inputs=X, block=OREPA)
    assert_same(output(again, X), output(model, X))


def test_the_models_own_norms_are_not_touched() -> None:
    net = stem_net()
    expanded = orepa.expand(net, inputs=batch())
    assert inserted_norms(expanded) == {}
    for name, value in net.state_dict().items():
        if "norm" in name:
            assert torch.equal(expanded.state_dict()[name], value)


def test_modes_and_hooks_are_put_back() -> None:
    net = bare_net()
    net.get_submodule("act1").eval()
    expanded = orepa.expand(net, inputs=X, block=OREPA)
    assert expanded.training
    assert not expanded.get_submodule("act1").training
    assert all(not module._forward_pre_hooks for module in expanded.modules())


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.aside = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        return y + self.relu(self.aside(x)) if self.training else y


def test_a_norm_that_no_batch_reaches_stays_the_identity() -> None:
    expanded = orepa.expand(Unused().double(), inputs=X, block=OREPA)
    norms = inserted_norms(expanded)
    assert norms.keys() == {"conv.norm", "aside.norm"}
    mean = norms["aside.norm"].running_mean
    assert mean is not None
    assert (mean == 0).all()
    assert (norms["conv.norm"].running_mean != 0).all()  # type: ignore[union-attr]


def test_after_a_step_the_calibrated_net_still_collapses() -> None:
    expanded = orepa.expand(bare_net(), inputs=X, block=OREPA)
    train_a_step(expanded, X)
    assert_same(output(orepa.collapse(expanded), X), output(expanded, X))
    plain = bare_net()
    plain.load_state_dict(orepa.collapse(expanded, fold_norm=False).state_dict())
    assert_same(output(plain, X), output(expanded, X))


@pytest.mark.parametrize("inputs", ["image", [], 3], ids=str)
def test_inputs_that_are_none(inputs: object) -> None:
    net = bare_net()
    with untouched(net), pytest.raises(ReparamError, match="inputs"):
        orepa.expand(net, inputs=inputs)


def test_half_precision_is_calibrated_in_float64() -> None:
    net = bare_net(torch.bfloat16)
    expanded = orepa.expand(net, inputs=X.bfloat16(), block=OREPA)
    block = expanded.get_submodule("conv1")
    assert isinstance(block, ConvBlock)
    assert isinstance(block.norm, nn.BatchNorm2d)
    assert block.norm.weight.dtype == torch.bfloat16
    assert_same(output(expanded, X.bfloat16()), output(net, X.bfloat16()))


def test_inputs_that_the_model_does_not_take_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    message = r"^the model raised at batch 0, inputs \(1, 5, 8, 8\) float32: .*; give inputs= that"
    with pytest.raises(orepa.ReparamError, match=message):
        orepa.expand(net, inputs=torch.zeros(1, 5, 8, 8))
