"""Norms behind convs of a class of one's own, that end in one conv with their kernel and bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from tests.norms import randomise_norms


class Own(nn.Conv2d):
    """A conv with a border of its own."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__(3, 8, 3, stride=2, bias=bias)
        self.border = nn.ZeroPad2d((0, 1, 0, 1))


class Padded(Own):
    def forward(self, x: Any) -> Any:
        return F.conv2d(self.border(x), self.weight, self.bias, self.stride, self.padding)


class Cast(Own):
    def forward(self, x: Any) -> Any:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(self.border(x), bias=bias, weight=self.weight.to(x.dtype), stride=2)


class Cropped(Own):
    def forward(self, x: Any) -> Any:
        return super().forward(F.pad(x, (2, 2, 2, 2), mode="reflect"))[:, :, 1:, :-1].contiguous()


class BehindLayers(Own):
    def __init__(self) -> None:
        super().__init__(bias=True)
        self.border = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid())  # type: ignore[assignment]

    def forward(self, x: Any) -> Any:
        return self._conv_forward(self.border(x), self.weight, self.bias)


class Transposed(nn.ConvTranspose2d):
    def __init__(self) -> None:
        super().__init__(3, 8, 4, stride=2)

    def forward(self, x: Any) -> Any:
        y = F.conv_transpose2d(F.relu(x), self.weight, self.bias, self.stride)
        return y[..., 1:-1, 1:-1]


class IgnoresBias(Own):
    def forward(self, x: Any) -> Any:
        return F.conv2d(self.border(x), self.weight, None, self.stride)


class Standardized(Own):
    def forward(self, x: Any) -> Any:
        return F.conv2d(self.border(x), self.weight - self.weight.mean(), self.bias, self.stride)


class ReadsTwice(Own):
    def forward(self, x: Any) -> Any:
        x = self.border(x) * self.weight.abs().mean()
        return F.conv2d(x, self.weight, self.bias, self.stride)


class OtherWithBias(Own):
    def forward(self, x: Any) -> Any:
        if self.bias is not None:
            x = 2 * x
        return F.conv2d(self.border(x), self.weight, self.bias, self.stride)


class ScaledBehind(Own):
    def forward(self, x: Any) -> Any:
        return F.relu(F.conv2d(self.border(x), self.weight, self.bias, self.stride))


class CutChannels(Own):
    def forward(self, x: Any) -> Any:
        y = F.conv2d(self.border(x), self.weight, self.bias, self.stride)
        return torch.cat([y[:, 4:], y[:, :4]], 1)


FOLDED = [Padded, Cast, Cropped, BehindLayers, Transposed]
KEPT = [IgnoresBias, Standardized, ReadsTwice, OtherWithBias, ScaledBehind, CutChannels]


def made(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    net = randomise_norms(nn.Sequential(kind(), nn.BatchNorm2d(8), nn.ReLU())).double().eval()
    return net, torch.randn(2, 3, 9, 10, dtype=torch.float64)


@pytest.mark.parametrize("expands", [False, True])
@pytest.mark.parametrize("kind", FOLDED)
def test_a_norm_goes_into_the_one_conv_that_a_forward_ends_in(
    kind: type[nn.Module], expands: bool
) -> None:
    net, x = made(kind)
    flat = orepa.collapse(orepa.expand(net) if expands else net)
    assert isinstance(flat[0], kind)
    assert isinstance(flat[1], nn.Identity)
    torch.testing.assert_close(flat(x), net(x))


@pytest.mark.parametrize("kind", KEPT)
def test_a_norm_stays_behind_a_forward_that_does_more_with_its_kernel(
    kind: type[nn.Module],
) -> None:
    net, x = made(kind)
    flat = orepa.collapse(net)
    assert isinstance(flat[1], nn.BatchNorm2d)
    torch.testing.assert_close(flat(x), net(x))


def test_a_conv_inside_of_a_conv_is_left_alone() -> None:
    net, x = made(BehindLayers)
    plan = orepa.plan(net, where="*")
    assert [edit.path for edit in plan.of("expand").edits] == ["0"]
    assert {r.path: r.reason for r in plan.refusals}["0.border.0"] == (
        "it is a part of 0, which is a BehindLayers"
    )
    torch.testing.assert_close(orepa.expand(net)(x), net(x))
