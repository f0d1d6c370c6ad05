"""What users write themselves: frozen norms by hand, mixtures, and what cannot be collapsed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.field.registry import Sum, conv_norm, published
from benchmarks.field.sequences import NormAndPad


class FrozenNorm(nn.Module):
    """A norm with fixed statistics, as detectors write it: s x + t."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


@published("conv, frozen norm of torchvision", "torchvision")
def frozen() -> nn.Module:
    return conv_norm(8, 12, 3, 1, 1, norm=FrozenBatchNorm2d)


@published("conv, frozen norm written by hand", "detectron2")
def frozen_by_hand() -> nn.Module:
    return conv_norm(8, 12, 3, 1, 1, norm=FrozenNorm)


class Functional(nn.Module):
    """A conv and a norm called as functions, with a branch beside them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)
        self.pool_scale = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        y = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.conv.weight, self.conv.bias)
        y = F.batch_norm(
            y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps
        )
        return F.relu(y + self.pool_scale * F.avg_pool2d(x, 3, 1, 1) - 0.5 * x)


@published("conv, norm and pooling as functions", "by hand")
def functional() -> nn.Module:
    return Functional(8)


@published("RepVGG in RepVGG: a sum of sums, scaled", "by hand")
def nested() -> nn.Module:
    def inner() -> nn.Module:
        return Sum(conv_norm(8, 8, 3, 1, 1), conv_norm(8, 8, 1), nn.BatchNorm2d(8))

    return nn.Sequential(Sum(inner(), nn.Sequential(inner(), nn.BatchNorm2d(8))), nn.ReLU())


@published("rectangles and even kernels, strided", "by hand")
def uneven() -> nn.Module:
    return Sum(
        conv_norm(8, 12, 4, 2, 1), conv_norm(8, 12, (2, 6), 2, (0, 2)), conv_norm(8, 12, 2, 2)
    )


@published("1 x 1, norm, padded with the norm of zero, then 3 x 3", "by hand")
def padded_path() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 8, 1, bias=False), NormAndPad(8, 1), *conv_norm(8, 12, 3), nn.ReLU()
    )


@published("replicate padding: 1 x 1 with bias - 3 x 3", "by hand")
def replicated() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.ReplicationPad2d(1), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)
    )


@published(
    "refused: 1 x 1 with norm, then a padded 3 x 3", "by hand", convs=2,
    refused="border: the first conv has a bias, so what it gives beyond the border is the bias",
)  # fmt: skip
def norm_then_zeros() -> nn.Module:
    return nn.Sequential(*conv_norm(8, 16, 1), *conv_norm(16, 8, 3, 1, 1))


@published(
    "refused: two padded 3 x 3", "by hand", convs=2,
    refused="border: padding (1, 1) before the second conv cuts off",
)  # fmt: skip
def two_padded() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), *conv_norm(32, 8, 3, 1, 1))


@published(
    "refused: padded with another number than the bias", "by hand", convs=2,
    refused="border: it pads with 1; a conv pads with zeros, or with the bias of the one before it",
)  # fmt: skip
def padded_with_one() -> nn.Module:
    return nn.Sequential(*conv_norm(8, 16, 1), nn.ConstantPad2d(1, 1.0), *conv_norm(16, 8, 3))


@published(
    "refused: depthwise - pointwise", "MobileNet", convs=2,
    refused="as one conv it would cost 864 MACs for each output position, apart it costs 168",
)  # fmt: skip
def separable() -> nn.Module:
    return nn.Sequential(*conv_norm(8, 8, 3, 1, 1, groups=8), *conv_norm(8, 12, 1))


@published(
    "refused: replicate padding between two 3 x 3", "by hand", convs=2,
    refused="border: padding (1, 1) before the second conv cuts off",
)  # fmt: skip
def replicated_twice() -> nn.Module:
    options = {"padding": 1, "padding_mode": "replicate"}
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, **options),  # type: ignore[arg-type]
        nn.Conv2d(32, 8, 3, **options),  # type: ignore[arg-type]
        nn.BatchNorm2d(8),
    )
