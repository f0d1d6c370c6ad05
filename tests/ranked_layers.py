"""Layers of other ranks and over other axes, each called with a map of C channels, rows, columns.

An axis that is taken for another fits as well: only the values tell.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn


class Factor(nn.Module):
    """A factor or a shift whose shape says along which axis it runs."""

    def __init__(self, shape: tuple[int, ...], *, is_added: bool) -> None:
        super().__init__()
        self.factor, self.is_added = nn.Parameter(torch.rand(shape) + 0.5), is_added

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor if self.is_added else x * self.factor


class OverRows(nn.Module):
    """A 1-d layer that takes the rows of each channel's map for its channels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).view(x.shape)


class OverPixels(OverRows):
    """A 1-d layer along the pixels of a map, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2)).view(x.shape)


class OverImages(OverRows):
    """A 3-d layer whose depth is the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)[None])[0].transpose(0, 1)


class OfFirstImage(OverRows):
    """A layer that runs on one image, without a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x[0])


class Beside(nn.Module):
    """Two layers of one map, added."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def factor(random: Random, size: int) -> nn.Module:
    axes = random.randint(0, 4)
    shape = [1] * axes
    for axis in range(axes):
        if random.random() < 0.4:
            shape[axis] = size
    return Factor(tuple(shape), is_added=random.random() < 0.3)


def linear(random: Random, size: int) -> nn.Linear:
    return nn.Linear(size, size, bias=random.random() < 0.5)


def conv_1d(random: Random, size: int) -> nn.Module:
    groups, bias = random.choice([1, 1, 2]), random.random() < 0.5
    if random.random() < 0.2:
        return nn.ConvTranspose1d(size, size, 3, padding=1, groups=groups, bias=bias)
    kernel = random.choice([1, 3])
    return nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=groups, bias=bias)


def conv_3d(random: Random, size: int) -> nn.Module:
    kernel = random.choice([(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)])
    padding = tuple(side // 2 for side in kernel)
    return nn.Conv3d(size, size, kernel, padding=padding, bias=random.random() < 0.5)


def transposed(random: Random, size: int) -> nn.Module:
    groups, bias = random.choice([1, 2]), random.random() < 0.5
    return nn.ConvTranspose2d(size, size, 3, padding=1, groups=groups, bias=bias)


def normed(make: Callable[[Random, int], nn.Module], *norms: type[nn.Module]) -> Any:
    """A layer with one of these norms behind it, before it, or none."""

    def layers(random: Random, size: int) -> nn.Module:
        pair = [make(random, size), random.choice(norms)(size)]  # type: ignore[call-arg]
        return nn.Sequential(*random.choice([pair, pair, pair[:1], pair[::-1]]))

    return layers


def over(kind: type[nn.Module], make: Callable[[Random, int], nn.Module]) -> Any:
    return lambda random, size: kind(make(random, size))  # type: ignore[call-arg]


def beside(first: Any, second: Any) -> Any:
    return lambda random, size: Beside(first(random, size), second(random, size))


Maker = Callable[[Random, int], nn.Module]
RANKED: dict[str, Maker] = {
    "factor": factor,
    "linear": linear,
    "linear pair": normed(linear, nn.BatchNorm2d),
    "transposed": normed(transposed, nn.BatchNorm2d, nn.SyncBatchNorm),
    "rows": over(OverRows, normed(conv_1d, nn.BatchNorm1d, nn.SyncBatchNorm)),
    "rows of linear": over(OverRows, normed(linear, nn.BatchNorm1d)),
    "rows of both": over(OverRows, beside(conv_1d, linear)),
    "pixels": over(OverPixels, normed(conv_1d, nn.BatchNorm1d)),
    "volume": over(OverImages, normed(conv_3d, nn.BatchNorm3d, nn.SyncBatchNorm)),
    "image": over(OfFirstImage, transposed),
    "linear beside": beside(linear, transposed),
}
