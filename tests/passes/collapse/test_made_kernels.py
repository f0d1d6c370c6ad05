"""Kernels that a forward makes at each call, also of numbers that it makes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa

Make = Callable[[Any], Tensor]


class Made(nn.Module):
    """A conv whose kernel is the conv's own, and what `make` gives beside it."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.one = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight + self.make(self)
        return torch.relu(F.conv2d(x, kernel, self.conv.bias, padding=1))


def _identity(m: Any) -> Tensor:
    width = m.conv.weight.shape[1]
    padded = F.pad(m.one, [1] * 4)
    return F.conv2d(padded, torch.eye(width).reshape(width, width, 1, 1))


def _where_it_lies(m: Any) -> Tensor:
    device = m.one.get_device()
    device = None if device < 0 else device
    return F.pad(m.one, [1] * 4) * torch.linspace(0, 1, 3, device=device)


def _written(m: Any) -> Tensor:
    kernel, scale = torch.zeros(4, 4, 3, 3), 2 * m.scale
    for i in range(m.scale.size(0)):
        kernel[i, i, :, :1] = scale[i]
    return F.conv2d(kernel, m.one.permute(1, 0, 2, 3))


def _numbers_written(m: Any) -> Tensor:
    kernel = torch.zeros(4, 4, 3, 3)
    for i in range(4):
        kernel[i, i, 1, 1] = 1.0
    return kernel * m.scale.reshape(-1, 1, 1, 1)


FOLDED: dict[str, Make] = {
    "of a shape": _identity,
    "where its weight lies": _where_it_lies,
    "written into a tensor of zeros": _written,
    "of numbers written one by one": _numbers_written,
}


def _alone(make: Make) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(Made(make), Made(make)).eval(), torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize("make", FOLDED.values(), ids=FOLDED)
def test_a_kernel_that_is_made_of_weights_and_numbers_is_computed_once(make: Make) -> None:
    net, x = _alone(make)
    flat = orepa.collapse(net)
    assert len(orepa.recorded_plans(flat)[-1].edits) == 2
    assert sum(p.numel() for p in flat.parameters()) == 2 * (4 * 4 * 9 + 4)
    torch.testing.assert_close(flat(x), net(x))


def _seen_before_the_write(m: Any) -> Tensor:
    kernel = torch.zeros(4, 4, 3, 3)
    kernel[0] = m.one[0]
    view, before = kernel[1], kernel.clone()
    kernel[1] = m.one[1]
    return kernel + before + view


def _written_by_a_method(m: Any) -> Tensor:
    kernel = torch.zeros(4, 4, 3, 3)
    first = kernel + 1
    kernel.add_(m.one)
    kernel[0] = m.one[1]
    return kernel.mul_(2) + first


def _written_through_a_view(m: Any) -> Tensor:
    kernel = torch.zeros(4, 4, 3, 3)
    row = kernel[2]
    row[:] = m.one[2]
    return kernel


def _written_as_out(m: Any) -> Tensor:
    kernel = torch.zeros(4, 4, 3, 3)
    torch.mul(m.conv.weight.detach(), 3, out=kernel)
    return kernel


def _drawn(m: Any) -> Tensor:
    torch.manual_seed(3)
    return torch.zeros(4, 4, 3, 3).normal_()


NOT_TRUSTED: dict[str, Make] = {
    "seen before it is written": _seen_before_the_write,
    "written by a method": _written_by_a_method,
    "written through a view": _written_through_a_view,
    "written as the out of a function": _written_as_out,
    "drawn at random": _drawn,
}


@pytest.mark.parametrize("make", NOT_TRUSTED.values(), ids=NOT_TRUSTED)
def test_what_writes_in_another_way_is_left_as_it_is(make: Make) -> None:
    net, x = _alone(make)
    flat = orepa.collapse(net)
    assert sum(p.numel() for p in flat.parameters()) == sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(flat(x), net(x))


class Twice(nn.Module):
    """Two convs of kernels of its own, in its forward; and what one conv for both would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 4, 1, 1))
        self.second = nn.Parameter(torch.randn(4, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.first), self.second, padding=1)

    def kernel(self) -> Tensor:
        return F.conv2d(self.second, self.first.permute(1, 0, 2, 3))


class Merging(nn.Module):
    """Calls a child in training; in eval mode makes one kernel of what the child holds (ECBSR)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(4, 4, 3, padding=1), Twice()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return torch.relu(self.conv(x) + self.twice(x))
        kernel = self.conv.weight + self.twice.kernel()
        return torch.relu(F.conv2d(x, kernel, self.conv.bias, padding=1))


def test_what_is_only_read_is_not_folded_for_itself() -> None:
    net = nn.Sequential(Merging(), Merging()).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    flat = orepa.collapse(net)
    assert [edit.path for edit in orepa.recorded_plans(flat)[-1].edits] == ["0", "1"]
    torch.testing.assert_close(flat(x), net(x))
    assert sum(p.numel() for p in flat.parameters()) == 2 * (4 * 4 * 9 + 4)
