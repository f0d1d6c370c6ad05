"""Nets that are random on purpose: the product must stay so, and follow the same random state."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.hostile.forms import SIZE, Branches, Form, Pair
from tests.hostile.judging import exact_or_refused


def weighed(weights: Callable[[Any, Any], Any]) -> Any:
    """Two branches, weighed by two numbers that are drawn in forward."""

    class Weighed(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.randn(2))

        def forward(self, x: Any) -> Any:
            w = weights(self, x)
            return self.norm(self.large(x) * w[0] + self.small(x) * w[1])

    return Weighed


def between(change: Callable[[Any], Any]) -> Any:
    class Between(Pair):
        def forward(self, x: Any) -> Any:
            return self.norm(change(self.conv(x)))

    return Between


class NoisyWeight(Pair):
    def forward(self, x: Any) -> Any:
        weight = self.conv.weight + 0.1 * torch.randn_like(self.conv.weight)
        return self.norm(F.conv2d(x, weight, self.conv.bias, padding=1))


class Bernoulli(Pair):
    """Filters are left out at random, in eval too."""

    def forward(self, x: Any) -> Any:
        kept = torch.bernoulli(torch.full((SIZE, 1, 1, 1), 0.5, dtype=torch.float64))
        weight = self.conv.weight * kept
        return self.norm(F.conv2d(x, weight, self.conv.bias, padding=1))


class DropPath(Branches):
    def forward(self, x: Any) -> Any:
        y = self.large(x)
        if random.random() < 0.5:
            y = y + self.small(x)
        return self.norm(y)


class SkipsNorm(Pair):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return self.norm(y) if np.random.rand() < 0.5 else y


class ShuffledOrder(Pair):
    def forward(self, x: Any) -> Any:
        layers = [self.conv, self.norm]
        random.shuffle(layers)
        for layer in layers:
            x = layer(x)
        return x


class OnTheWeight(nn.Module):
    """Dropout of a kernel, by a layer that always drops."""

    class Drop(nn.Dropout):
        def train(self, mode: bool = True) -> Any:
            return super().train(True)

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.norm = Branches(), self.Drop(0.5), nn.BatchNorm2d(SIZE)

    def forward(self, x: Any) -> Any:
        return self.norm(self.drop(self.body.large(x)))


class OwnGenerator(Pair):
    """Draws from a generator of its own: the same at each call."""

    def forward(self, x: Any) -> Any:
        generator = torch.Generator().manual_seed(4)
        g = torch.rand(SIZE, 1, 1, generator=generator, dtype=torch.float64)
        return self.norm(self.conv(x) * g)


def drawn(draw: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda y: y * draw()


def chosen(m: Any, x: Any) -> Any:
    return F.one_hot(torch.multinomial(m.logits.softmax(0), 1)[0], 2)


def varying(make: Any) -> Form:
    return Form(make, varies=True)


FORMS = {
    "gumbel softmax": varying(weighed(lambda m, x: F.gumbel_softmax(m.logits))),
    "rand": varying(weighed(lambda m, x: torch.rand(2, dtype=torch.float64))),
    "random.random": varying(weighed(lambda m, x: (random.random(), random.random()))),
    "numpy": varying(weighed(lambda m, x: np.random.rand(2))),
    "dropout of weights": varying(weighed(lambda m, x: F.dropout(m.logits, 0.5, training=True))),
    "multinomial": varying(weighed(chosen)),
    "uniform_": varying(weighed(lambda m, x: torch.empty(2, dtype=torch.float64).uniform_())),
    "random.choice": varying(weighed(lambda m, x: random.choice([(0.3, 0.7), (0.9, 0.1)]))),
    "dropout always": varying(between(lambda y: F.dropout(y, 0.5, training=True))),
    "dropout by default": varying(between(lambda y: F.dropout2d(y, 0.5))),
    "rrelu": varying(between(lambda y: F.rrelu(y, training=True))),
    "scalar drawn": varying(between(drawn(lambda: torch.randn((), dtype=torch.float64)))),
    "shift drawn": varying(between(lambda y: y + torch.randn(1, SIZE, 1, 1, dtype=torch.float64))),
    "channels shuffled": varying(between(lambda y: y[:, torch.randperm(SIZE)])),
    "noisy weight": varying(NoisyWeight),
    "bernoulli filters": varying(Bernoulli),
    "drop path": varying(DropPath),
    "norm skipped": varying(SkipsNorm),
    "order": varying(ShuffledOrder),
    "layer that always drops": varying(OnTheWeight),
    "own generator": Form(OwnGenerator),
}

test_exact_or_refused = exact_or_refused(FORMS)
