"""The small net of the tests of training, plain and expanded, in float64 and train mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from tests.norms import randomise_norms


class Residual(nn.Module):
    """An activation and a way past it: without one, blocks would keep a norm in each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.relu(x)


def stock_net() -> nn.Module:
    stem = (nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    body = (nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), Residual())
    tail = (nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    return nn.Sequential(*stem, *body, *tail).double()


def expanded_net() -> nn.Module:
    torch.manual_seed(0)
    return orepa.expand(randomise_norms(stock_net())).train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    groups = orepa.param_groups(model, weight_decay=1e-2)
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()
