"""Nets of every kind that a verdict has to be right about, each from a seed, with trained norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A model in eval mode and a batch for it."""

    model: nn.Module
    inputs: Tensor


def conv_norm(
    c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Activated(nn.Module):
    """Conv, norm, SiLU: the unit of every YOLO."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.body = conv_norm(c_in, c_out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.body(x))


class Bottleneck(nn.Module):
    def __init__(self, width: int, is_residual: bool) -> None:
        super().__init__()
        self.first, self.second = Activated(width, width), Activated(width, width, 3)
        self.is_residual = is_residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return x + y if self.is_residual else y


class Stage(nn.Module):
    """C3 of YOLOv5: one half through bottlenecks, one beside them, joined by a 1 x 1."""

    def __init__(self, c_in: int, c_out: int, depth: int = 1, is_residual: bool = True) -> None:
        super().__init__()
        half = c_out // 2
        self.left, self.right = Activated(c_in, half), Activated(c_in, half)
        self.body = nn.Sequential(*(Bottleneck(half, is_residual) for _ in range(depth)))
        self.join = Activated(2 * half, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.body(self.left(x)), self.right(x)], 1))


class Pooled(nn.Module):
    """SPPF: a map beside itself, pooled once, twice and three times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = Activated(width, width // 2), Activated(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, 1, 2))
        return self.last(torch.cat(maps, 1))


class Detector(nn.Module):
    """A net as YOLOv5n's: five strides down, two up and two down again, boxes in pixels."""

    WIDTHS = (16, 32, 64, 128, 256)

    def __init__(self, classes: int = 20, scale: float = 1.0) -> None:
        super().__init__()
        a, b, c, d, e = (max(4, int(width * scale)) for width in self.WIDTHS)
        self.stem = nn.Sequential(Activated(3, a, 5, 2), Activated(a, b, 3, 2), Stage(b, b))
        self.low = nn.Sequential(Activated(b, c, 3, 2), Stage(c, c, 2))
        self.middle = nn.Sequential(Activated(c, d, 3, 2), Stage(d, d, 3))
        self.high = nn.Sequential(Activated(d, e, 3, 2), Stage(e, e), Pooled(e))
        self.narrow_high, self.up_middle = Activated(e, d), Stage(2 * d, d, 1, False)
        self.narrow_middle, self.up_low = Activated(d, c), Stage(2 * c, c, 1, False)
        self.down_low, self.out_middle = Activated(c, c, 3, 2), Stage(2 * c, d, 1, False)
        self.down_middle, self.out_high = Activated(d, d, 3, 2), Stage(2 * d, e, 1, False)
        self.heads = nn.ModuleList(nn.Conv2d(width, 3 * (5 + classes), 1) for width in (c, d, e))
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(self.stem(x))
        middle = self.middle(low)
        high = self.narrow_high(self.high(middle))
        middle = self.narrow_middle(self.up_middle(_joined(high, middle)))
        first = self.up_low(_joined(middle, low))
        second = self.out_middle(torch.cat([self.down_low(first), middle], 1))
        third = self.out_high(torch.cat([self.down_middle(second), high], 1))
        maps = zip(self.heads, (first, second, third), (8.0, 16.0, 32.0), strict=True)
        return torch.cat([self._boxes(head(value), stride) for head, value, stride in maps], 1)

    def _boxes(self, values: Tensor, stride: float) -> Tensor:
        n, _, height, width = values.shape
        cells = values.view(n, 3, 5 + self.classes, height, width).permute(0, 1, 3, 4, 2).sigmoid()
        rows = torch.arange(height, dtype=values.dtype, device=values.device)
        columns = torch.arange(width, dtype=values.dtype, device=values.device)
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
        centres = (cells[..., :2] * 2 - 0.5 + grid) * stride
        sizes = (cells[..., 2:4] * 2) ** 2 * (4 * stride)
        return torch.cat([centres, sizes, cells[..., 4:]], -1).flatten(1, 3)


def _joined(small: Tensor, large: Tensor) -> Tensor:
    return torch.cat([F.interpolate(small, scale_factor=2.0, mode="nearest"), large], 1)


class Residual(nn.Module):
    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for body in self.bodies:
            y = y + body(x)
        return y.relu()


class Segmenter(nn.Module):
    """A score for each class and position, the class that comes first, and a mask."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(3, width), nn.ReLU(), conv_norm(width, width, 3, 2))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = F.interpolate(self.head(self.body(x)), scale_factor=2.0, mode="bilinear")
        return {"scores": scores, "classes": scores.argmax(1), "mask": scores[:, 0] > 0}


def _head(width: int, outputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs)]


def _deep(random: Random) -> nn.Module:
    width, depth = random.choice([2, 3, 4, 8]), random.choice([12, 24, 40])
    layers: list[nn.Module] = [conv_norm(3, width), nn.ReLU()]
    for _ in range(depth):
        body = conv_norm(width, width, random.choice([1, 3]))
        layers += [Residual(body)] if random.random() < 0.5 else [body, nn.Hardswish()]
    return nn.Sequential(*layers, *_head(width, random.choice([2, 10])))


def _tiny(random: Random) -> nn.Module:
    width = random.choice([1, 2, 3])
    layers = [conv_norm(3, width, random.choice([1, 3])), random.choice([nn.ReLU(), nn.SiLU()])]
    if random.random() < 0.5:
        layers += [conv_norm(width, width), nn.Tanh()]
    return nn.Sequential(*layers, *(_head(width, 1) if random.random() < 0.6 else []))


def _mixed(random: Random) -> nn.Module:
    width = random.choice([4, 8, 16])
    layers: list[nn.Module] = [conv_norm(3, width, 3, 2), nn.ReLU()]
    for _ in range(random.randint(1, 6)):
        layers.append(random.choice(_PARTS)(width, random))
    return nn.Sequential(*layers, *(_head(width, 10) if random.random() < 0.5 else []))


_PARTS: tuple[Callable[[int, Random], nn.Module], ...] = (
    lambda width, random: Residual(conv_norm(width, width), conv_norm(width, width, 1)),
    lambda width, random: nn.Sequential(conv_norm(width, width, 5, groups=width), nn.Hardswish()),
    lambda width, random: nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, width, 1)),
    lambda width, random: nn.Sequential(conv_norm(width, width, 3, groups=2), nn.Sigmoid()),
    lambda width, random: nn.Sequential(nn.GroupNorm(2, width), conv_norm(width, width), nn.GELU()),
    lambda width, random: nn.AvgPool2d(3, 1, 1),
)


def _wide(random: Random) -> nn.Module:
    body = [conv_norm(3, 32, 3, 2), nn.ReLU(), conv_norm(32, 64, 3, 2), nn.ReLU()]
    return nn.Sequential(*body, *_head(64, 1000))


FAMILIES: dict[str, Callable[[Random], nn.Module]] = {
    "YOLO-like": lambda random: Detector(scale=random.choice([0.25, 0.5, 1.0])),
    "deep and narrow": _deep,
    "tiny": _tiny,
    "mixed": _mixed,
    "1000 classes": _wide,
    "segmentation": lambda random: Segmenter(random.choice([4, 16]), random.choice([3, 21])),
}


def subject(family: str, seed: int) -> Subject:
    """The net of a family that a seed stands for, and a batch of one or two images."""
    random = Random(seed)
    torch.manual_seed(seed)
    model = _trained(FAMILIES[family](random)).eval()
    size = 64 if family == "YOLO-like" else random.choice([8, 16, 32])
    return Subject(model, torch.randn(random.choice([1, 2]), 3, size, size))


@torch.no_grad()
def _trained(model: nn.Module) -> nn.Module:
    """With norms as training leaves them: with fresh ones a forgotten mean does not show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for values, low in (
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
                (module.weight, 0.5),
                (module.bias, -0.5),
            ):
                values.copy_(low + torch.rand_like(values))
    return model
