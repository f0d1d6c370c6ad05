"""Real models, right and spoilt: what the mutation suite injects its faults into."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orepa_compiler.model_source import load_model
from tests.norms import randomise_norms

# The convs that faults go into: a 3x3 in the middle of test_resnet, and one of stride 2.
CONV, STRIDED = "layer2.0.conv2", "layer2.0.conv1"
RESNET, EFFICIENTNET = "timm:test_resnet", "timm:test_efficientnet"

Change = Callable[[nn.Conv2d], None]


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def trained(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise_norms(load_model(name)).eval()


def spoilt(model: nn.Module, path: str, change: Callable[[Any], Any]) -> nn.Module:
    """A copy of the model whose module at `path` was changed, or replaced by what came back."""
    bad = copy.deepcopy(model)
    with torch.no_grad():
        replacement = change(bad.get_submodule(path))
    if isinstance(replacement, nn.Module):
        bad.set_submodule(path, replacement)
    return bad


def weight(change: Callable[[Tensor], Tensor]) -> Change:
    """A change of a conv's weight."""

    def apply(conv: nn.Conv2d) -> None:
        conv.weight.copy_(change(conv.weight.clone()))

    return apply


def poked(value: float) -> Change:
    def apply(conv: nn.Conv2d) -> None:
        conv.weight[0, 0, 0, 0] = value

    return apply


def flipped_bit(bit: int) -> Change:
    def apply(conv: nn.Conv2d) -> None:
        bits = conv.weight.detach().view(torch.int32)
        bits[1, 2, 1, 1] ^= 1 << bit

    return apply


def bias(change: Callable[[Tensor], Tensor]) -> Change:
    def apply(layer: Any) -> None:
        layer.bias.copy_(change(layer.bias.clone()))

    return apply


class Padded(nn.Module):
    """A conv whose map is padded otherwise than it should be; the output's shape is the same."""

    def __init__(self, conv: nn.Conv2d, pads: tuple[int, int, int, int], mode: str = "constant"):
        super().__init__()
        self.conv, self.pads, self.mode = copy.deepcopy(conv), pads, mode
        self.conv.padding = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, self.pads, self.mode))


def padded(*pads: int, mode: str = "constant") -> Callable[[nn.Conv2d], nn.Module]:
    return lambda conv: Padded(conv, pads, mode)  # type: ignore[arg-type]


def dilated(conv: nn.Conv2d) -> None:
    conv.dilation, conv.padding = (2, 2), (2, 2)


class BatchStatistics(nn.Module):
    """A norm that goes on as in training, whatever mode it is put in."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm, act = self.norm, getattr(self.norm, "act", nn.Identity())
        y = functional.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        return act(y)  # type: ignore[no-any-return]
