"""What stands behind a conv is told by what it computes, whatever it is called."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.capture import capture
from orepa_compiler.defaults.computed import (
    ACTIVATES,
    CLOSES,
    NORMALIZES,
    SCALES,
    kind_of_function,
)
from orepa_compiler.defaults.following import ACTIVATION, NORM, followed_by
from orepa_compiler.passes import is_leaf

C = 8


class Own(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor], *children: nn.Module) -> None:
        super().__init__()
        self.run, self.children_of_it = run, nn.ModuleList(children)
        self.gain = nn.Parameter(torch.ones(1, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Hard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.clip = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.clip(x + 3) / 6


class HardSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Hard()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Snake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, C, 1))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(shape[0], shape[1], -1)
        x = x + torch.sin(self.alpha.exp() * x).pow(2) / (self.alpha.exp() + 1e-9)
        return x.reshape(shape)


class ByRank(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) if x.dim() == 4 else x


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, 1, 1) > 0.1) if self.training else x


class Net(nn.Module):
    """Two convs, and between them what is told; t: a vector for each image."""

    def __init__(self, between: Callable[[Any, Tensor, Tensor], Tensor], *layers: nn.Module):
        super().__init__()
        self.conv, self.other = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
        self.norm, self.embedded = nn.GroupNorm(2, C), nn.Linear(4, C)
        self.layers, self.between = nn.Sequential(*layers), between

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.other(self.between(self, self.conv(x), self.embedded(t)))


def layered(*layers: nn.Module) -> Net:
    return Net(lambda n, y, t: n.layers(y), *layers)


def inline(run: Callable[[Any, Tensor], Tensor]) -> Net:
    return Net(lambda n, y, t: run(n, y))


def embedding(run: Callable[[Any, Tensor, Tensor], Tensor]) -> Net:
    return Net(lambda n, y, t: F.silu(n.norm(run(n, y, t))))


FOLLOWED: dict[str, tuple[Callable[[], Net], str]] = {
    "a class of one's own": (lambda: layered(Own(lambda m, x: F.gelu(x))), ACTIVATION),
    "with a gate inside": (lambda: layered(HardSwish()), ACTIVATION),
    "reshapes inside": (lambda: layered(Snake()), ACTIVATION),
    "its own control flow": (lambda: layered(ByRank()), ACTIVATION),
    "behind a dropout of one's own": (lambda: layered(Dropped(), nn.ReLU()), ACTIVATION),
    "a scale before it": (lambda: inline(lambda n, y: torch.relu(0.1 * y)), ACTIVATION),
    "swish": (lambda: inline(lambda n, y: y * torch.sigmoid(1.7 * y)), ACTIVATION),
    "gelu": (lambda: inline(lambda n, y: y * (1 + torch.erf(y / math.sqrt(2)))), ACTIVATION),
    "leaky": (lambda: inline(lambda n, y: torch.where(y > 0, y, 0.1 * y)), ACTIVATION),
    "a norm of one's own": (
        lambda: layered(
            Own(lambda m, x: x * torch.rsqrt(x.square().mean(1, True) + 1e-6) * m.gain)
        ),
        NORM,
    ),
    "a scale before a norm": (
        lambda: inline(lambda n, y: n.norm(y * n.norm.weight.view(1, -1, 1, 1))),
        NORM,
    ),
    "an embedding before a norm": (lambda: embedding(lambda n, y, t: y + t[..., None, None]), NORM),
    "viewed": (lambda: embedding(lambda n, y, t: t.view(-1, C, 1, 1) + y), NORM),
    "by unsqueeze": (lambda: embedding(lambda n, y, t: y + t.unsqueeze(-1).unsqueeze(-1)), NORM),
    "of another axis": (lambda: embedding(lambda n, y, t: y + t[:, :, None, :]), "followed by add"),
    "a gate of one's own": (
        lambda: Net(lambda n, y, t: n.layers(y) * t[..., None, None], Hard()),
        "followed by the gate Hard",
    ),
    "the same for the next conv alone": (lambda: layered(Hard()), ACTIVATION),
    "a residual": (
        lambda: inline(lambda n, y: 0.2 * y + n.other(y)),
        "several consumers: followed by a conv, followed by mul",
    ),
    "a norm that another way passes": (
        lambda: inline(lambda n, y: n.norm(y) + y),
        "several consumers: followed by add, norm",
    ),
    "nothing but a scale": (lambda: inline(lambda n, y: 2 * y), "followed by a conv"),
    "a softmax": (lambda: inline(lambda n, y: y.softmax(1)), "followed by softmax"),
}


@pytest.mark.parametrize(("make", "expected"), FOLLOWED.values(), ids=FOLLOWED)
def test_what_follows(make: Callable[[], Net], expected: str) -> None:
    captured = capture(make(), training=True, is_leaf=is_leaf)
    assert followed_by(captured, "conv") == expected


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "elu": (F.elu, ACTIVATES),
    "relu6": (F.relu6, ACTIVATES),
    "tanh": (torch.tanh, CLOSES),
    "half": (lambda x: x / 2 + 1, SCALES),
    "identity": (lambda x: x, SCALES),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[1:]), NORMALIZES),
    "unit length": (lambda x: F.normalize(x, dim=1), NORMALIZES),
    "drawn": (lambda x: x * torch.rand_like(x), ""),
    "rounded": (lambda x: x.half().float(), ""),
    "pooled": (lambda x: F.avg_pool2d(x, 3, 1, 1), ""),
    "flipped": (lambda x: x.flip(1), ""),
    "smaller": (lambda x: x[:, :2], ""),
    "one number": (lambda x: torch.ones_like(x), SCALES),
    "no map": (lambda x: (x, x), ""),  # type: ignore[dict-item,return-value]
    "an error": (lambda x: x.reshape(7), ""),
    "not finite": (lambda x: torch.log(x), ""),
}


@pytest.mark.parametrize(("function", "kind"), KINDS.values(), ids=KINDS)
def test_kind_of_function(function: Callable[[Tensor], Tensor], kind: str) -> None:
    state = torch.get_rng_state()
    assert kind_of_function(function, (2, C, 4, 4)) == kind
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_that_keeps_count_is_not_run() -> None:
    class Counts(nn.Module):
        calls: ClassVar[list[int]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(0)
            return F.gelu(x)

    captured = capture(layered(Counts()), training=True, is_leaf=is_leaf)
    assert followed_by(captured, "conv") == "followed by Counts"


def test_what_an_activation_of_ones_own_makes_of_the_plan() -> None:
    net = nn.Sequential(nn.Conv1d(1, C, 3), Own(lambda m, x: F.gelu(x)), nn.Conv1d(C, C, 3))
    net.append(Snake())
    plan = orepa.plan(net, inputs=torch.randn(1, 1, 32))
    assert [edit.path for edit in plan.of("expand").edits] == ["0", "2"]


def test_what_many_concatenations_lead_to() -> None:
    class Dense(nn.Module):
        def __init__(self, depth: int = 24) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4 * (i + 1)) for i in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = torch.cat([x, conv(torch.relu(norm(x))[:, :4])], 1)
            return x

    captured = capture(Dense(), training=True, is_leaf=is_leaf)
    assert followed_by(captured, "convs.0") == (
        "several consumers: its output is the model's, norm"
    )
    assert followed_by(captured, "convs.23") == "its output is the model's"
