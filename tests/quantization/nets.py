"""Nets that round: every kind of layer, and what is known of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.quantization.layers import Rounded, rounded_layers
from tests.norms import randomise_norms


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Convs with a norm, without one, grouped and strided, a residual sum, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 6), nn.ReLU(), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z: Tensor = self.head(self.deep(torch.relu(y + self.body(y))))
        return z


def plain() -> nn.Module:
    torch.manual_seed(0)
    net = randomise_norms(Net())
    with torch.no_grad():
        net.stem[1].weight[0] *= -1  # a norm that turns the sign of a channel
        net.stem[1].weight[1] = 0.0  # and one that leaves nothing of it
    return net.eval()


def linear_blocks() -> nn.Module:
    return orepa.expand(plain(), block=orepa.OREPA)


def scaled_blocks() -> nn.Module:
    return orepa.expand(plain(), block=replace(orepa.OREPA, scaling_layer="scalar"))


def offline_blocks() -> nn.Module:
    offline = replace(orepa.OREPA, name="OFFLINE", scaling_layer="norm")
    return randomise_norms(orepa.expand(plain(), block=offline, inputs=images()))


FORMS = {
    "plain": plain,
    "linear blocks": linear_blocks,
    "scaled blocks": scaled_blocks,
    "offline blocks": offline_blocks,
}


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """The model after a few steps, in eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(images(8, seed=step)).square().mean().backward()
        optimizer.step()
    return model.eval()


def kernels(model: nn.Module) -> dict[str, Tensor]:
    """The integers of each layer that rounds."""
    layers: dict[str, Rounded] = rounded_layers(model)
    return {path: layer.integers().int() for path, layer in layers.items()}
