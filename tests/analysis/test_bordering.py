"""Borders that a forward writes side by side: joined where they hold the bias, and else refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm, is_conv_like
from tests.convolution_reference import assert_same
from tests.norms import randomise_norms
from tests.operator_factories import random_tensor

SIDES = ("top", "bottom", "left", "right")


def write(y: Tensor, value: Any, sides: tuple[str, ...] = SIDES, p: int = 1) -> Tensor:
    for side in sides:
        if side == "top":
            y[:, :, :p] = value
        elif side == "bottom":
            y[:, :, -p:, :] = value
        elif side == "left":
            y[:, :, :, 0:p] = value
        else:
            y[:, :, :, -p:] = value
    return y


def of_zero(bn: Any) -> Tensor:
    """What a norm makes of zero."""
    shift = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return shift.view(1, -1, 1, 1)


class Net(nn.Module):
    def __init__(self, border: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 1)
        self.bn = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3)
        self.other = nn.Conv2d(4, 6, 3)
        self.border = border

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.border(self, x))


def made(border: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    net = Net(border)
    assert net.first.bias is not None
    return randomise_norms(net.double().eval())


def padded(y: Tensor, p: int = 1) -> Tensor:
    return F.pad(y, (p, p, p, p))


def bias_of(m: Any) -> Tensor:
    bias: Tensor = m.first.bias.view(1, -1, 1, 1)
    return bias


def after_norm(m: Any, x: Tensor) -> Tensor:
    return write(padded(m.bn(F.conv2d(x, m.first.weight))), of_zero(m.bn))


JOINED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the bias of a conv": lambda m, x: write(padded(m.first(x)), bias_of(m)),
    "in another order": lambda m, x: write(padded(m.first(x)), bias_of(m), SIDES[::-1]),
    "one side twice": lambda m, x: write(padded(m.first(x)), bias_of(m), (*SIDES, "left")),
    "two pixels": lambda m, x: write(padded(m.first(x), 2), bias_of(m), p=2),
    "over a reflected border": lambda m, x: write(
        F.pad(m.first(x), (1, 1, 1, 1), "reflect"), bias_of(m)
    ),
    "two sides": lambda m, x: write(F.pad(m.first(x), (0, 0, 1, 1)), bias_of(m), SIDES[:2]),
    "the norm of zero": after_norm,
}


@pytest.mark.parametrize("border", JOINED.values(), ids=JOINED)
def test_a_border_that_holds_the_bias_is_joined(
    border: Callable[[Any, Tensor], Tensor],
) -> None:
    net, x = made(border), random_tensor(2, 4, 6, 7)
    deploy = orepa.collapse(net)
    assert sum(map(is_conv_like, deploy.modules())) == 1
    assert not any(map(is_batch_norm, deploy.modules()))
    assert_same(deploy(x), net(x))


OTHER = "border: it is padded with something else than the bias of the conv before it"
APART: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "another value": (lambda m, x: write(padded(m.first(x)), 2 * bias_of(m)), OTHER),
    "a value of the same statistics": (
        lambda m, x: write(padded(m.bn(F.conv2d(x, m.first.weight))), m.bn.bias.view(1, -1, 1, 1)),
        OTHER,
    ),
    "a number": (lambda m, x: write(padded(m.first(x)), 0.5), ""),
    "one side left out": (lambda m, x: write(padded(m.first(x)), bias_of(m), SIDES[1:]), ""),
    "too wide above": (
        lambda m, x: write(F.pad(m.first(x), (0, 0, 1, 0)), bias_of(m), SIDES[:1], 2),
        "",
    ),
    "too wide": (lambda m, x: write(padded(m.first(x)), bias_of(m), p=2), ""),
    "not wide enough": (lambda m, x: write(padded(m.first(x), 2), bias_of(m), p=1), ""),
    "two values": (
        lambda m, x: write(
            write(padded(m.first(x)), bias_of(m), SIDES[:2]), bias_of(m) * 1, SIDES[2:]
        ),
        "",
    ),
    "some channels": (lambda m, x: some_channels(padded(m.first(x)), bias_of(m)), ""),
    "read in between": (lambda m, x: read_between(padded(m.first(x)), bias_of(m)), ""),
    "a kernel that is not pointwise": (
        lambda m, x: write(padded(m.other(x)), m.other.bias.view(-1, 1, 1)),
        "border: padding (1, 1) before the second conv cuts off what the first one (kernel (3, 3)) "
        "gives beyond the border; put all the padding on the first conv",
    ),
}  # fmt: skip


def some_channels(y: Tensor, value: Tensor) -> Tensor:
    y[:, 1:, :1] = value[:, 1:]
    return write(y, value, SIDES[1:])


def read_between(y: Tensor, value: Tensor) -> Tensor:
    y = write(y, value, SIDES[:2])
    z = y * 2
    return write(y, value, SIDES[2:]) + z


@pytest.mark.parametrize(("border", "reason"), APART.values(), ids=APART)
def test_any_other_border_is_kept(border: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    net, x = made(border), random_tensor(2, 4, 6, 7)
    deploy = orepa.collapse(net)
    assert any(isinstance(m, nn.Conv2d) and m.in_channels == 6 for m in deploy.modules())
    assert_same(deploy(x), net(x))
    refused = [r.reason for r in orepa.recorded_plans(deploy)[-1].refusals]
    assert not reason or reason in refused


class NormAndPad(nn.Module):
    """A norm whose own parameters its owner reads."""

    def __init__(self, channels: int, factor: float = 1.0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return write(padded(self.bn(x)), self.factor * of_zero(self.bn))


@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_a_norm_whose_owner_reads_it_goes_with_the_owner_or_not_at_all(factor: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 6, 1, bias=False), NormAndPad(6, factor), nn.Conv2d(6, 5, 3), nn.ReLU()
    )
    randomise_norms(net.double().eval())
    x = random_tensor(2, 4, 6, 7)
    deploy = orepa.collapse(net)
    assert_same(deploy(x), net(x))
    assert sum(map(is_conv_like, deploy.modules())) == (1 if factor == 1.0 else 2)
    reasons = {r.path: r.reason for r in orepa.recorded_plans(deploy)[-1].refusals}
    assert reasons == ({} if factor == 1.0 else {
        "1.bn": "the forward of 1 reads its weight directly",
        "1": OTHER,
    })  # fmt: skip


def test_a_look_at_the_dtype_of_a_weight_is_no_obstacle() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x.to(self.conv.weight.dtype)))

    net, x = randomise_norms(Casting().double().eval()), random_tensor(2, 4, 6, 7)
    deploy = orepa.collapse(net)
    assert_same(deploy(x), net(x))
    assert not any(map(is_batch_norm, deploy.modules()))


def test_a_norm_that_its_owner_reads_elsewhere_stays() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)).relu() * self.bn.weight.view(-1, 1, 1)

    net, x = randomise_norms(Reader().double().eval()), random_tensor(2, 4, 6, 7)
    deploy = orepa.collapse(net)
    assert_same(deploy(x), net(x))
    assert [r.reason for r in orepa.recorded_plans(deploy)[-1].refusals] == [
        "the forward of the model reads its weight directly"
    ]
