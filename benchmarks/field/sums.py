"""Blocks that add up branches: ACNet, RepVGG and what came of them, dilated and large kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.field.registry import SqueezeExcite, Sum, conv_norm, published


class Crop(nn.Module):
    """The map without its outermost rows and columns, as ACNet crops for its thin kernels."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        if self.rows and self.columns:
            return x[:, :, self.rows : -self.rows, self.columns : -self.columns]
        return (
            x[:, :, self.rows : -self.rows] if self.rows else x[..., self.columns : -self.columns]
        )


@published("ACNet", "Ding et al., ICCV 2019")
def acnet() -> nn.Module:
    return Sum(
        conv_norm(8, 12, 3, 1, 1), conv_norm(8, 12, (3, 1), 1, (1, 0)),
        conv_norm(8, 12, (1, 3), 1, (0, 1)),
    )  # fmt: skip


@published("ACNet, 5 x 5, stride 2, padding 3", "Ding et al., ICCV 2019")
def acnet_padded() -> nn.Module:
    return Sum(
        conv_norm(8, 12, 5, 2, 3), conv_norm(8, 12, (5, 1), 2, (3, 1)),
        conv_norm(8, 12, (1, 5), 2, (1, 3)),
    )  # fmt: skip


@published("ACNet without padding: cropped", "Ding et al., ICCV 2019")
def acnet_cropped() -> nn.Module:
    thin = [nn.Sequential(Crop(0, 1), *conv_norm(8, 12, (3, 1))),
            nn.Sequential(Crop(1, 0), *conv_norm(8, 12, (1, 3)))]  # fmt: skip
    return Sum(conv_norm(8, 12, 3), *thin)


class RepVGG(nn.Module):
    """relu(se(norm(conv3(x)) + norm(conv1(x)) + norm(x))); plus: the gate behind the activation."""

    def __init__(
        self,
        width: int,
        out: int,
        *,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        se: str = "",
        norm: type[nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.rbr_dense = conv_norm(width, out, 3, stride, dilation, dilation, groups, norm=norm)
        self.rbr_1x1 = conv_norm(width, out, 1, stride, groups=groups, norm=norm)
        has_identity = width == out and stride == 1
        self.rbr_identity = norm(width) if has_identity else None
        self.se = SqueezeExcite(out) if se == "before" else nn.Identity()
        self.nonlinearity = nn.ReLU()
        self.post_se = SqueezeExcite(out) if se == "behind" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        total = self.rbr_dense(x) + self.rbr_1x1(x) + identity
        return self.post_se(self.nonlinearity(self.se(total)))


@published("RepVGG", "Ding et al., CVPR 2021")
def repvgg() -> nn.Module:
    return RepVGG(8, 8)


@published("RepVGG, stride 2, groups 4", "Ding et al., CVPR 2021")
def repvgg_grouped() -> nn.Module:
    return RepVGG(8, 16, stride=2, groups=4)


@published("RepVGG, dilation 2", "Ding et al., CVPR 2021")
def repvgg_dilated() -> nn.Module:
    return RepVGG(8, 8, dilation=2)


@published("RepVGG, squeeze-excite", "Ding et al., CVPR 2021", convs=3)
def repvgg_se() -> nn.Module:
    return RepVGG(8, 8, se="before")


@published("RepVGGplus", "Ding et al., the RepVGG code", convs=3)
def repvggplus() -> nn.Module:
    return RepVGG(8, 8, se="behind")


@published("RepVGG, SyncBatchNorm", "Ding et al., CVPR 2021")
def repvgg_sync() -> nn.Module:
    return RepVGG(8, 8, norm=nn.SyncBatchNorm)


class QARepVGG(nn.Module):
    """norm(norm(conv3(x)) + conv1(x) + alpha x): one norm inside, one behind the sum."""

    def __init__(self, width: int, *, alpha: bool) -> None:
        super().__init__()
        self.dense = conv_norm(width, width, 3, 1, 1)
        self.point = nn.Conv2d(width, width, 1, bias=False)
        self.alpha = nn.Parameter(torch.tensor(1.0)) if alpha else 1.0
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        total = self.dense(x) + self.alpha * self.point(x) + x
        return self.act(self.norm(total))


@published("QARepVGG", "Chu et al., AAAI 2024 (YOLOv6)")
def qarepvgg() -> nn.Module:
    return QARepVGG(8, alpha=False)


@published("QARepVGG, alpha on the 1 x 1", "super-gradients")
def qarepvgg_alpha() -> nn.Module:
    return QARepVGG(8, alpha=True)


class RepConv(nn.Module):
    """act(norm(conv3(x)) + norm(conv1(x)) + norm(x)), as the YOLO line writes it."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(width, out, 3, stride, 1)
        self.conv2 = conv_norm(width, out, 1, stride)
        self.bn = nn.BatchNorm2d(width) if width == out and stride == 1 else None
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        identity = 0 if self.bn is None else self.bn(x)
        return self.act(self.conv1(x) + self.conv2(x) + identity)


@published("RepConv", "Wang et al., YOLOv7")
def repconv() -> nn.Module:
    return RepConv(8, 8, 1)


@published("RepConv, stride 2", "Wang et al., YOLOv7")
def repconv_strided() -> nn.Module:
    return RepConv(8, 16, 2)


@published("RepConvN: conv and 1 x 1 behind one norm", "ultralytics Conv2")
def conv2() -> nn.Module:
    total = Sum(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1, bias=False))
    return nn.Sequential(total, nn.BatchNorm2d(8), nn.SiLU())


@published("UniRepLKNet, dilated reparam 13 x 13", "Ding et al., CVPR 2024", shape=(8, 20, 20))
def dilated_reparam() -> nn.Module:
    branches = [(5, 1), (7, 2), (3, 3), (3, 4), (3, 5)]
    small = [conv_norm(8, 8, k, 1, d * (k - 1) // 2, d, 8) for k, d in branches]
    return Sum(conv_norm(8, 8, 13, 1, 6, groups=8), *small)


@published("UniRepLKNet, layer-scale behind a 1 x 1", "Ding et al., CVPR 2024", convs=2)
def unireplknet_tail() -> nn.Module:
    return Scaled(nn.Sequential(nn.Conv2d(8, 32, 1), nn.GELU(), *conv_norm(32, 8, 1)), 8)


class Scaled(nn.Module):
    """x + gamma f(x), one factor a channel."""

    def __init__(self, inner: nn.Module, channels: int) -> None:
        super().__init__()
        self.inner = inner
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma.reshape(1, -1, 1, 1) * self.inner(x)


class ScaleLayer(nn.Module):
    """s x, with one trained factor a channel."""

    def __init__(self, channels: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = nn.Parameter(torch.rand(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        channels = x.size(1)
        if self.bias is None:
            return x * self.weight.view(1, channels, 1, 1)
        return x * self.weight.view(1, channels, 1, 1) + self.bias.view(1, channels, 1, 1)


class LinearAdd(nn.Module):
    """relu(norm(s_1 conv3(x) + s_2 conv1(x) + s_3 x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.scale_conv = ScaleLayer(width)
        self.conv_1x1 = nn.Conv2d(width, width, 1, bias=False)
        self.scale_1x1 = ScaleLayer(width)
        self.scale_identity = ScaleLayer(width)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        total = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
        total += self.scale_identity(x)
        return torch.relu(self.bn(total))


@published("RepOpt, linear block", "Ding et al., ICLR 2023")
def repopt() -> nn.Module:
    return LinearAdd(8)


@published("a conv with scale and shift", "by hand")
def scale_and_shift() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), ScaleLayer(8, bias=True))
