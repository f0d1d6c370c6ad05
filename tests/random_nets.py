"""Nets of random steps: layers, arithmetic, writes in place, views, children with several ways in.

All maps have CHANNELS channels and keep their size, so any step may read any value. They have as
many rows, columns and images: an axis that is taken for another fits too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ranked_layers import RANKED

CHANNELS = 8
C = CHANNELS


class Step(NamedTuple):
    """What a net does next with the values that it made `a` and `b` steps ago.

    seed: chooses among the forms of a layer. inner: the steps of a child.
    """

    kind: str
    a: int
    b: int
    seed: int
    inner: tuple[Step, ...] = ()


def conv(random: Random, c_in: int = C) -> nn.Conv2d:
    kernel = random.choice([(1, 1), (3, 3), (3, 3), (1, 3), (3, 1), (5, 5), (2, 2)])
    dilation = random.choice([1, 1, 1, 2])
    same = tuple(dilation * (size - 1) // 2 for size in kernel)
    return nn.Conv2d(
        c_in,
        C,
        kernel,
        padding="same" if kernel == (2, 2) or random.random() < 0.2 else same,
        dilation=dilation,
        groups=random.choice([1, 1, 1, 2, 4]),
        bias=random.random() < 0.5,
        padding_mode=random.choice(["zeros"] * 4 + ["reflect", "replicate", "circular"]),
    )


def norm(random: Random) -> nn.Module:
    return nn.BatchNorm2d(C, affine=random.random() < 0.8)


def pair(random: Random) -> nn.Sequential:
    return nn.Sequential(conv(random), norm(random))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def shuffled(random: Random) -> nn.Sequential:
    layers: list[nn.Module] = [conv(random), nn.Conv2d(C, C, 1), norm(random), norm(random)]
    layers += [nn.Identity(), nn.Dropout2d(0.3), nn.ReLU()]
    return nn.Sequential(*random.sample(layers, 4))


def padded(random: Random) -> nn.Sequential:
    pad = random.choice([nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ConstantPad2d(1, 0.5)])
    return nn.Sequential(norm(random), pad, nn.Conv2d(C, C, 3), norm(random))


LAYERS: dict[str, Callable[[Random], nn.Module]] = {
    "conv": conv,
    "norm": norm,
    "group norm": lambda random: nn.GroupNorm(2, C),
    "relu": lambda random: nn.ReLU(inplace=random.random() < 0.5),
    "hardswish": lambda random: nn.Hardswish(),
    "average": lambda random: nn.AvgPool2d(3, 1, 1, count_include_pad=random.random() < 0.5),
    "largest": lambda random: nn.MaxPool2d(3, 1, 1),
    "dropout": lambda random: nn.Dropout2d(0.3, inplace=random.random() < 0.5),
    "pair": pair,
    "residual": lambda random: Residual(*pair(random)),
    "shuffled": shuffled,
    "padded": padded,
    **{name: partial(make, size=C) for name, make in RANKED.items()},
}  # called with one map
OTHER_LAYERS: dict[str, Callable[[Random], nn.Module]] = {
    "by keyword": conv,
    "cat": lambda random: conv(random, 2 * C),
    "gate": conv,
    "weight": conv,
    "twice": conv,
    "function norm": lambda random: nn.BatchNorm2d(C),
    "items": pair,
    "sum": lambda random: nn.ModuleList(pair(random) for _ in range(3)),
    "mode": norm,
    "tokens": lambda random: nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.LayerNorm(C)),
}


def written(x: Tensor, y: Tensor) -> Tensor:
    x[:, :1] = y[:, :1]
    return x


def added(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def swapped(x: Tensor) -> Tensor:
    first, rest = torch.split(x, [1, C - 1], dim=1)
    return torch.cat([rest, first * 2], 1)


ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "add half": lambda x, y: torch.add(x, y, alpha=0.5),
    "add in place": added,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * torch.sigmoid(y),
    "factor": lambda x, y: (1 - x) / 2,
    "relu in place": lambda x, y: F.relu(x, inplace=True),
    "split": lambda x, y: swapped(x),
    "view": lambda x, y: x.view(x.size(0), C, -1).view(x.shape),
    "write": written,
    "write into a copy": lambda x, y: written(x.clone(), y),
    "centre": lambda x, y: x - x.mean((2, 3), keepdim=True),
    "stack": lambda x, y: torch.stack([x, y]).sum(0),
    "cast": lambda x, y: x.float().to(y.dtype) if x.dtype == torch.float16 else x,
    "alias": lambda x, y: x,
}


def run_other(net: nn.Module, step: Step, layer: Any, x: Any, y: Any) -> Any:
    match step.kind:
        case "by keyword":
            return layer(input=x)
        case "cat":
            return layer(torch.cat([x, y], 1))
        case "gate":
            return x * torch.sigmoid(layer(y))
        case "weight":
            return layer(x) + layer.weight.detach().abs().max()
        case "twice":
            return layer(x) + layer(y)
        case "function norm":
            state = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
            return F.batch_norm(x, *state, net.training)
        case "items":
            z = layer[0](x)
            return layer[1](z) if step.seed % 2 else layer[1](z) + z
        case "sum":
            return sum(part(x) for part in layer)
        case "mode":
            return layer(x) if net.training else layer(x) + 0
        case "tokens":
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    raise AssertionError(step.kind)


RETURNS: dict[str, Callable[[Any, Any], Any]] = {
    "child": lambda x, y: x,
    "child of a pair": lambda x, y: (x, None),
    "child of a dict": lambda x, y: {"x": x, "y": y},
    "child of a list": lambda x, y: [x, y],
}
TAKES: dict[str, Callable[[Any], Any]] = {
    "child": lambda value: value,
    "child of a pair": lambda value: value[0] if value[1] is None else value[1],
    "child of a dict": lambda value: value["x"] - value["y"],
    "child of a list": lambda value: sum(value) if isinstance(value, list) else value,
}
KINDS = (*LAYERS, *OTHER_LAYERS, *ARITHMETIC, *RETURNS)


class RandomNet(nn.Module):
    """Runs its steps one after the other, and returns what its kind of child does."""

    def __init__(self, steps: tuple[Step, ...], kind: str = "child") -> None:
        super().__init__()
        self.steps, self.kind = steps, kind
        for number, step in enumerate(steps):
            make = {**LAYERS, **OTHER_LAYERS}.get(step.kind)
            if make is not None:
                self.add_module(f"s{number}", make(Random(step.seed)))
            elif step.kind in RETURNS:
                self.add_module(f"s{number}", RandomNet(step.inner, step.kind))

    def forward(self, x: Any, other: Any = None) -> Any:
        values = [x] if other is None else [x, x - other / 2]
        for number, step in enumerate(self.steps):
            a, b = (values[-1 - min(at, len(values) - 1)] for at in (step.a, step.b))
            values.append(self._run(step, getattr(self, f"s{number}", None), a, b))
        return RETURNS[self.kind](values[-1], values[len(values) // 2])

    def _run(self, step: Step, layer: Any, x: Any, y: Any) -> Any:
        if step.kind in LAYERS:
            return layer(x)
        if step.kind in ARITHMETIC:
            return ARITHMETIC[step.kind](x, y)
        if step.kind in RETURNS:
            return TAKES[step.kind](layer(x, y) if step.seed % 2 else layer(x))
        return run_other(self, step, layer, x, y)
