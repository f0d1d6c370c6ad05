"""Offline multi-branch blocks as their users write them: every branch with norms of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler_nets import conv_norm


class NormAndPad(nn.Module):
    """DBB's norm between two convs: its border is what the norm makes of zero."""

    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        self.bn, self.padding = nn.BatchNorm2d(width), padding

    def forward(self, x: Tensor) -> Tensor:
        norm, p = self.bn, self.padding
        y = norm(x)
        if p == 0:
            return y
        border = norm.bias.detach() - norm.running_mean * norm.weight.detach() / torch.sqrt(
            norm.running_var + norm.eps
        )
        y, border = F.pad(y, [p] * 4), border.view(1, -1, 1, 1)
        y[:, :, 0:p, :], y[:, :, -p:, :] = border, border
        y[:, :, :, 0:p], y[:, :, :, -p:] = border, border
        return y


class DiverseBranches(nn.Module):
    """DBB: k x k, 1 x 1, 1 x 1 - k x k and 1 x 1 - average pool, each with its norms."""

    def __init__(self, width_in: int, width: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        options = {"bias": False, "groups": groups}
        self.origin = conv_norm(width_in, width, 3, stride=stride, padding=1, groups=groups)
        self.pointwise = conv_norm(width_in, width, 1, stride=stride, groups=groups)
        self.stacked = nn.Sequential(
            OrderedDict(
                first=nn.Conv2d(width_in, width_in, 1, **options),
                inner=NormAndPad(width_in, 1),
                second=nn.Conv2d(width_in, width, 3, stride=stride, **options),
                norm=nn.BatchNorm2d(width),
            )
        )
        self.average = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(width_in, width, 1, **options),
                inner=NormAndPad(width, 1),
                pool=nn.AvgPool2d(3, stride=stride, padding=0),
                norm=nn.BatchNorm2d(width),
            )
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.origin(x)
        y += self.pointwise(x)
        y += self.average(x)
        y += self.stacked(x)
        return self.act(y)


class Asymmetric(nn.Module):
    """ACNet: k x k, 1 x k and k x 1."""

    def __init__(self, width_in: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.square = conv_norm(width_in, width, 3, stride=stride, padding=1)
        self.flat = conv_norm(width_in, width, (1, 3), stride=stride, padding=(0, 1))  # type: ignore[arg-type]
        self.tall = conv_norm(width_in, width, (3, 1), stride=stride, padding=(1, 0))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.square(x) + self.flat(x) + self.tall(x))


class Excitation(nn.Module):
    """Squeeze-and-excitation: a factor per image, so no conv can take it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(y))


class Excited(nn.Module):
    """RepVGG with its identity norm, and squeeze-and-excitation behind the sum."""

    def __init__(self, width_in: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.dense = conv_norm(width_in, width, 3, stride=stride, padding=1)
        self.pointwise = conv_norm(width_in, width, 1, stride=stride)
        keeps = width_in == width and stride == 1
        self.identity = nn.BatchNorm2d(width) if keeps else None
        self.excitation, self.act = Excitation(width), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        same = 0 if self.identity is None else self.identity(x)
        return self.act(self.excitation(self.dense(x) + self.pointwise(x) + same))


class NormAfterSum(nn.Module):
    """RepViT's token mixer: a depthwise conv and norm, a 1 x 1, the input, and a norm behind."""

    def __init__(self, width_in: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.widen = nn.Conv2d(width_in, width, 1, stride=stride)
        self.conv = conv_norm(width, width, 3, padding=1, groups=width)
        self.conv1, self.bn = nn.Conv2d(width, width, 1, groups=width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.widen(x))
        return self.bn(self.conv(x) + self.conv1(x) + x)


class Scaled(nn.Module):
    """RepMixer: the input and, scaled by a parameter, a difference of branches."""

    def __init__(self, width_in: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.widen = nn.Conv2d(width_in, width, 1, stride=stride)
        self.mixer, self.norm = conv_norm(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.widen(x))
        return x + self.gamma * (self.mixer(x) - self.norm(x))


class Factored(nn.Module):
    """Stacks beside a k x k: 1 x k - k x 1, a dilated 3 x 3, depthwise - 1 x 1 with a norm."""

    def __init__(self, width_in: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.dense = conv_norm(width_in, width, 5, stride=stride, padding=2)
        self.crossed = nn.Sequential(
            nn.Conv2d(width_in, width, (1, 3), padding=(1, 1), bias=False),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, (3, 1), stride=stride),
            nn.BatchNorm2d(width),
        )
        self.dilated = conv_norm(width_in, width, 3, stride=stride, padding=2, dilation=2)
        self.separable = nn.Sequential(
            nn.Conv2d(width_in, 2 * width_in, 3, stride, 1, groups=width_in, bias=False),
            nn.BatchNorm2d(2 * width_in),
            conv_norm(2 * width_in, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.crossed(x) + self.dilated(x) + self.separable(x))


BLOCKS: dict[str, tuple[Callable[..., nn.Module], list[str]]] = {
    "DBB": (DiverseBranches, ["origin", "pointwise", "average", "pointwise_kernel"]),
    "ACNet": (Asymmetric, ["origin", "kernel_1x3", "kernel_3x1"]),
    "RepVGG with SE": (Excited, ["origin", "pointwise", "identity"]),
    "RepViT": (NormAfterSum, ["origin", "pointwise", "identity"]),
    "RepMixer": (Scaled, ["identity", "origin", "identity_2"]),
    "stacks": (Factored, ["origin", "kernel_kernel", "kernel_3x3", "depthwise_pointwise"]),
}


def offline_net(block: Callable[..., nn.Module]) -> nn.Sequential:
    """Two blocks, the second one able to keep its input, and a head; in float64, train mode."""
    torch.manual_seed(4)
    blocks = OrderedDict(first=block(3, 6, stride=2), second=block(6, 6))
    head = OrderedDict(pool=nn.AdaptiveAvgPool2d(2), flat=nn.Flatten(), head=nn.Linear(24, 5))
    return nn.Sequential(OrderedDict(**blocks, **head)).double()
