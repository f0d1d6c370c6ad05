"""Sums, differences and scaling layers that stand in a forward as arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm, is_conv_like
from tests.norms import randomise_norms


class Scale(nn.Module):
    """LayerScale: one factor per channel."""

    def __init__(self, channels: int, *, inplace: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.view(1, -1, 1, 1)
        return x.mul_(gamma) if self.inplace else x * gamma


class Net(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.second = nn.BatchNorm2d(4)
        self.scale = Scale(4)
        self.writing = Scale(4, inplace=True)
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.row = nn.Parameter(torch.rand(1, 1, 1, 6) + 0.5)
        self.one = nn.Parameter(torch.rand(1) + 0.5)
        self.relu = nn.ReLU()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def check(run: Callable[[Any, Tensor], Tensor], *, convs: int, norms: int) -> nn.Module:
    """Collapse keeps the function, and leaves so many convs and norms."""
    torch.manual_seed(0)
    net = randomise_norms(Net(run).double()).eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = net(x.clone())
    deploy = orepa.collapse(net)
    torch.testing.assert_close(deploy(x.clone()), expected, rtol=1e-12, atol=1e-12)
    called = [m for m in deploy.modules() if is_conv_like(m) or is_batch_norm(m)]
    plan = orepa.recorded_plans(deploy)[-1]
    folded = {path for edit in plan.edits for path in edit.options["modules"]}
    assert ("norm" in folded) == (norms == 0), called
    assert sum(is_conv_like(m) for m in called) == convs
    return deploy


def mixer(net: Any, x: Tensor) -> Tensor:
    return x + net.scale(net.second(net.other(x)) - net.norm(x))


def with_parameter(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) * net.gamma + x


def parameter_first(net: Any, x: Tensor) -> Tensor:
    return net.gamma * net.norm(net.conv(x)) - x


def reshaped(net: Any, x: Tensor) -> Tensor:
    return x - net.norm(net.conv(x)).mul(net.gamma.reshape(1, -1, 1, 1))


def writing(net: Any, x: Tensor) -> Tensor:
    return net.writing(net.norm(net.conv(x)))


@pytest.mark.parametrize("run", [mixer, with_parameter, parameter_first, reshaped])
def test_a_sum_of_scaled_branches_becomes_one_conv(run: Callable[[Any, Tensor], Tensor]) -> None:
    deploy = check(run, convs=1, norms=0)
    assert not list(deploy.buffers())
    assert len(list(deploy.parameters())) == 2


def test_a_scaling_layer_that_writes_over_its_input() -> None:
    deploy = check(writing, convs=2, norms=0)
    assert isinstance(deploy.writing, nn.Identity)


def keeps_what_is_overwritten(net: Any, x: Tensor) -> Tensor:
    y = net.relu(x)
    return net.norm(net.conv(net.writing(y))) + y


def shared_operand(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = net.norm(y * net.gamma)
    return z + y


def another_axis(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(x) * net.row)


def two_maps(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(x) * net.other(x))


@pytest.mark.parametrize("run", [shared_operand, another_axis, two_maps])
def test_what_is_no_scaling_of_channels_stays(run: Callable[[Any, Tensor], Tensor]) -> None:
    check(run, convs=2, norms=1)


def test_an_input_that_is_overwritten_for_others_to_read() -> None:
    check(keeps_what_is_overwritten, convs=2, norms=0)


class Tokens(nn.Module):
    """A linear layer and a norm on tokens, (N, tokens, C)."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.conv(x).flatten(2).transpose(1, 2))


def flattened(net: Any, x: Tensor) -> Tensor:
    x = net.linear(x)
    return net.norm(x.flatten(0, 1)).reshape_as(x)


def directly(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.linear(x))


def read_again(net: Any, x: Tensor) -> Tensor:
    y = net.linear(x)
    return net.norm(y.flatten(0, 1)).reshape_as(y) + y


@pytest.mark.parametrize(("run", "left"), [(flattened, 0), (directly, 1), (read_again, 1)])
def test_a_norm_on_flattened_tokens(run: Callable[[Any, Tensor], Tensor], left: int) -> None:
    torch.manual_seed(0)
    net = randomise_norms(Tokens(run).double()).eval()  # 6 tokens of width 6: nothing tells them
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    deploy = orepa.collapse(net)
    torch.testing.assert_close(deploy(x), net(x), rtol=1e-12, atol=1e-12)
    assert sum(is_batch_norm(module) for module in deploy.modules()) == left
    if run is directly:
        (refusal,) = orepa.recorded_plans(deploy)[-1].refusals
        assert refusal.reason.startswith("a linear layer works on the last axis, a conv or a norm")
