"""Small nets and outputs that the tests of a comparison share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.verification.verdict import Report
from tests.norms import randomise_norms

with warnings.catch_warnings():
    # Importing it, torch warns of a decorator that torch itself uses there.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.fx.experimental.optimization import fuse

__all__ = ["Returning", "X", "changed", "folded", "fuse", "net", "only_row", "poke", "reasons"]

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(outputs: int = 5) -> nn.Sequential:
    """Conv, norm, ReLU, pooling, linear, with random norms."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, outputs)]
    return randomise_norms(nn.Sequential(*body, *head).eval())


def folded(model: nn.Sequential) -> nn.Sequential:
    """The same net without its norm, folded in float64 by the textbook's formula."""
    conv, norm, *rest = deepcopy(model).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    plain = nn.Conv2d(3, 6, 3, padding=1).double()
    plain.weight = nn.Parameter(conv.weight * scale[:, None, None, None])
    plain.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    return nn.Sequential(plain, *rest).float().eval()


class Returning(nn.Module):
    """A net that returns what `shape_outputs` makes of its feature map and scores."""

    def __init__(self, shape_outputs: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.shape_outputs = net(), shape_outputs

    def forward(self, x: Tensor) -> Any:
        features = self.net[:3](x)
        return self.shape_outputs(features, self.net[3:](features))


def changed(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A candidate that spoils the right outputs."""
    return lambda x: change(net()(x).detach())


def poke(value: float, index: tuple[int, int] = (1, 2)) -> Callable[[Tensor], Tensor]:
    def change(y: Tensor) -> Tensor:
        y[index] = value
        return y

    return change


def only_row(report: Report) -> Any:
    (row,) = report.rows
    return row


def reasons(report: Report) -> str:
    return " | ".join(f"{row.name}: {row.reason}" for row in report.rows if not row.ok)
