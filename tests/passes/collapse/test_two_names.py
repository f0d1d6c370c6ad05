"""Blocks that are registered under two names, as U-Nets do: folded where they hang in one place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from tests.convolution_reference import assert_same
from tests.norms import randomise_norms


def unit(channels: int, *, ends: bool = False) -> nn.Sequential:
    conv = nn.Conv2d(channels, 4, 3, padding=1)
    return nn.Sequential(conv) if ends else nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU())


class Runner(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.second = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Net(nn.Module):
    """Holds its blocks in a list, and in what runs them."""

    def __init__(self, *blocks: nn.Module, times: int = 1, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.runner = Runner(*blocks)
        self.times = times
        self.behind = behind or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.runner(x)
        for _ in range(self.times - 1):
            x = self.blocks[1](self.behind(x))
        return self.behind(x)


def left(net: nn.Module) -> int:
    return sum(map(is_batch_norm, net.modules()))


NETS: dict[str, Any] = {
    "called once": (lambda: Net(unit(3), unit(4)), 0),
    "one called by both names": (lambda: Net(unit(3), unit(4), times=2), 0),
    "a norm behind both calls": (
        lambda: Net(unit(3), unit(4, ends=True), times=2, behind=nn.BatchNorm2d(4)),
        1,
    ),
}


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize(("make", "stay"), NETS.values(), ids=NETS)
def test_blocks_with_two_names(make: Any, stay: int, given: bool) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = randomise_norms(make().double()).eval()
    before = copy.deepcopy(net)
    for model in (net, orepa.expand(net, inputs=x).eval()):
        deploy: Any = orepa.collapse(model, inputs=x if given else None)
        assert_same(deploy(x), model(x))
        assert left(deploy) == stay
        assert deploy.blocks[0] is deploy.runner.first
        assert deploy.blocks[1] is deploy.runner.second
    assert_same(net(x), before(x))


def test_a_forward_that_is_written_anew_stands_under_both_names() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.one(x) + self.two(x)))

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = randomise_norms(Net(unit(3), Two()).double()).eval()
    deploy: Any = orepa.collapse(net, inputs=x)
    assert_same(deploy(x), net(x))
    assert left(deploy) == 0
    assert sum(isinstance(part, nn.Conv2d) for part in deploy.modules()) == 2
    assert deploy.blocks[1] is deploy.runner.second
