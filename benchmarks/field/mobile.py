"""Blocks of mobile nets: MobileOne, FastViT, RepViT, RepGhost, GhostNetV3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.field.registry import SqueezeExcite, Sum, conv_norm, published
from benchmarks.field.sums import Scaled


class MobileOne(nn.Module):
    """act(se(sum of n norm(conv(x)) + norm(scale(x)) + norm(x)))."""

    def __init__(
        self,
        width: int,
        out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        count: int = 3,
        se: bool = False,
        act: bool = True,
        scale: bool = True,
    ) -> None:
        super().__init__()
        self.identity = nn.BatchNorm2d(width) if width == out and stride == 1 else None
        self.conv_scale = None
        if kernel > 1 and scale:
            self.conv_scale = conv_norm(width, out, 1, stride, groups=groups)
        self.conv_kxk = nn.ModuleList(
            conv_norm(width, out, kernel, stride, kernel // 2, groups=groups) for _ in range(count)
        )
        self.se = SqueezeExcite(out) if se else nn.Identity()
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        total = 0 if self.identity is None else self.identity(x)
        if self.conv_scale is not None:
            total = total + self.conv_scale(x)
        for conv in self.conv_kxk:
            total = total + conv(x)
        return self.act(self.se(total))


@published("MobileOne, depthwise", "Vasu et al., CVPR 2023")
def mobileone_depthwise() -> nn.Module:
    return MobileOne(8, 8, groups=8)


@published("MobileOne, pointwise", "Vasu et al., CVPR 2023")
def mobileone_pointwise() -> nn.Module:
    return MobileOne(8, 12, 1)


@published("MobileOne, stride 2, squeeze-excite", "Vasu et al., CVPR 2023", convs=3)
def mobileone_se() -> nn.Module:
    return MobileOne(8, 8, stride=2, groups=8, se=True)


@published("FastViT, MobileOneBlock", "Vasu et al., ICCV 2023")
def fastvit_mobileone() -> nn.Module:
    return MobileOne(8, 8, groups=8, count=1)


@published("FastViT, large kernel", "Vasu et al., ICCV 2023")
def fastvit_large_kernel() -> nn.Module:
    large = conv_norm(8, 16, 7, 2, 3, groups=8)
    return nn.Sequential(Sum(large, conv_norm(8, 16, 3, 2, 1, groups=8)), nn.GELU())


class RepMixer(nn.Module):
    """x + gamma (mixer(x) - norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = MobileOne(width, width, groups=width, count=1, act=False)
        self.norm = MobileOne(width, width, count=0, act=False, scale=False)
        self.gamma = nn.Parameter(torch.rand(width, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * (self.mixer(x) - self.norm(x))


@published("FastViT, RepMixer", "Vasu et al., ICCV 2023")
def repmixer() -> nn.Module:
    return RepMixer(8)


class PositionEncoding(nn.Module):
    """conv(x) + x, depthwise 7 x 7."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pos_enc = nn.Conv2d(width, width, 7, 1, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.pos_enc(x) + x


@published("FastViT, RepConditionalPosEnc", "Vasu et al., ICCV 2023")
def position_encoding() -> nn.Module:
    return PositionEncoding(8)


class RepVGGDepthwise(nn.Module):
    """norm(norm(conv3(x)) + conv1(x) + x), depthwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv_norm(width, width, 3, 1, 1, groups=width)
        self.conv1 = nn.Conv2d(width, width, 1, groups=width)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.conv1(x)) + x)


@published("RepViT, RepVggDw", "Wang et al., CVPR 2024")
def repvit() -> nn.Module:
    return RepVGGDepthwise(8)


@published("RepViT, token mixer with gate", "Wang et al., CVPR 2024", convs=3)
def repvit_mixer() -> nn.Module:
    return nn.Sequential(RepVGGDepthwise(8), SqueezeExcite(8))


class RepGhost(nn.Module):
    """relu(norm(cheap(y)) + norm(y)), y = relu(norm(primary(x)))."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.primary = nn.Sequential(*conv_norm(width, out, 1), nn.ReLU(inplace=True))
        self.fusion_bn = nn.BatchNorm2d(out)
        self.cheap = conv_norm(out, out, 3, 1, 1, groups=out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return self.relu(self.cheap(y) + self.fusion_bn(y))


@published("RepGhost", "Chen et al., 2022", convs=2)
def repghost() -> nn.Module:
    return RepGhost(8, 12)


class GhostV3(nn.Module):
    """The first out channels of [y, cheap(y)], y = primary(x): sums of n convs, scale and skip."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.out = out
        self.primary = MobileOne(width, out // 2, 1)
        self.cheap = MobileOne(out // 2, out // 2, 3, groups=out // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)[:, : self.out]


@published("GhostNetV3", "Liu et al., 2024", convs=2)
def ghostnetv3() -> nn.Module:
    return GhostV3(8, 12)


@published("GhostNetV3, depthwise with skip", "Liu et al., 2024")
def ghostnetv3_depthwise() -> nn.Module:
    return MobileOne(8, 8, 3, groups=8, act=False)


@published("layer-scale behind a block", "by hand")
def scaled_block() -> nn.Module:
    return Scaled(MobileOne(8, 8, groups=8, act=False), 8)
