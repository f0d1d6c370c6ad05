"""Blocks with convs one behind the other, or kernels made in the forward: DBB, ECBSR, DO-Conv."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.field.registry import Sum, conv_norm, published


class NormAndPad(nn.Module):
    """norm(pad(x)): the output is padded with what the norm makes of zeros, side by side."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.pad_pixels = padding

    def forward(self, x: Tensor) -> Tensor:
        output = self.bn(x)
        if self.pad_pixels > 0:
            bn = self.bn
            values = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(
                bn.running_var + bn.eps
            )
            output = F.pad(output, [self.pad_pixels] * 4)
            values = values.view(1, -1, 1, 1)
            output[:, :, 0 : self.pad_pixels, :] = values
            output[:, :, -self.pad_pixels :, :] = values
            output[:, :, :, 0 : self.pad_pixels] = values
            output[:, :, :, -self.pad_pixels :] = values
        return output


class IdentityPointwise(nn.Module):
    """A 1 x 1 conv that starts as the identity: kernel + 1."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        width = channels // groups
        self.groups = groups
        self.conv = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.id_tensor = torch.eye(width).repeat(groups, 1).reshape(channels, width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight + self.id_tensor.to(self.conv.weight.device).type_as(
            self.conv.weight
        )
        return F.conv2d(x, kernel, None, stride=1, padding=0, groups=self.groups)


class DiverseBranches(nn.Module):
    """k x k, 1 x 1, 1 x 1 - k x k and 1 x 1 - average, each with its norms, added."""

    def __init__(self, width: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        p = kernel // 2
        self.origin = conv_norm(width, out, kernel, stride, p, groups=groups)
        pool, self.point = nn.AvgPool2d(kernel, stride), None
        if groups < out:
            conv = nn.Conv2d(width, out, 1, groups=groups, bias=False)
            self.average = nn.Sequential(conv, NormAndPad(out, p), pool, nn.BatchNorm2d(out))
            self.point = conv_norm(width, out, 1, stride, groups=groups)
            first: nn.Module = IdentityPointwise(width, groups)
            inner = width
        else:
            pool = nn.AvgPool2d(kernel, stride, p)
            self.average = nn.Sequential(pool, nn.BatchNorm2d(out))
            first = nn.Conv2d(width, 2 * width, 1, groups=groups, bias=False)
            inner = 2 * width
        second = nn.Conv2d(inner, out, kernel, stride, groups=groups, bias=False)
        self.point_kernel = nn.Sequential(first, NormAndPad(inner, p), second, nn.BatchNorm2d(out))
        self.nonlinear = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        total = self.origin(x)
        if self.point is not None:
            total += self.point(x)
        total += self.average(x)
        total += self.point_kernel(x)
        return self.nonlinear(total)


@published("DBB", "Ding et al., CVPR 2021")
def dbb() -> nn.Module:
    return DiverseBranches(8, 12, 3)


@published("DBB, 5 x 5, stride 2, groups 2", "Ding et al., CVPR 2021")
def dbb_grouped() -> nn.Module:
    return DiverseBranches(8, 12, 5, 2, 2)


@published("DBB, depthwise", "Ding et al., CVPR 2021")
def dbb_depthwise() -> nn.Module:
    return DiverseBranches(8, 8, 3, groups=8)


_SOBEL = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
_LAPLACE = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])


def _padded_with(x: Tensor, bias: Tensor) -> Tensor:
    """x with a border of one pixel that holds the bias, written side by side."""
    padded = F.pad(x, (1, 1, 1, 1), "constant", 0)
    border = bias.view(1, -1, 1, 1)
    padded[:, :, 0:1, :] = border
    padded[:, :, -1:, :] = border
    padded[:, :, :, 0:1] = border
    padded[:, :, :, -1:] = border
    return padded


class PointThenKernel(nn.Module):
    """1 x 1, padded with its bias, then 3 x 3; both kernels are parameters of the module."""

    def __init__(self, width: int, out: int, multiplier: float) -> None:
        super().__init__()
        middle = int(out * multiplier)
        first, second = nn.Conv2d(width, middle, 1), nn.Conv2d(middle, out, 3)
        self.k0, self.b0, self.k1, self.b1 = first.weight, first.bias, second.weight, second.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(input=x, weight=self.k0, bias=self.b0, stride=1)
        return F.conv2d(input=_padded_with(y, self.b0), weight=self.k1, bias=self.b1, stride=1)


class PointThenEdge(nn.Module):
    """1 x 1, padded with its bias, then a fixed edge filter with a trained scale and bias."""

    def __init__(self, width: int, out: int, edge: Tensor) -> None:
        super().__init__()
        first = nn.Conv2d(width, out, 1)
        self.k0, self.b0 = first.weight, first.bias
        self.scale = nn.Parameter(torch.randn(out, 1, 1, 1) * 1e-3)
        self.bias = nn.Parameter(torch.randn(out) * 1e-3)
        mask = edge.reshape(1, 1, 3, 3).repeat(out, 1, 1, 1)
        self.mask = nn.Parameter(mask, requires_grad=False)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(input=x, weight=self.k0, bias=self.b0, stride=1)
        return F.conv2d(
            input=_padded_with(y, self.b0), weight=self.scale * self.mask, bias=self.bias,
            stride=1, groups=self.out,
        )  # fmt: skip


@published("ECB", "Zhang et al., ACM MM 2021 (ECBSR)")
def ecb() -> nn.Module:
    edges = [PointThenEdge(8, 8, edge) for edge in (_SOBEL, _SOBEL.T.contiguous(), _LAPLACE)]
    total = Sum(nn.Conv2d(8, 8, 3, padding=1), PointThenKernel(8, 8, 2.0), *edges)
    return nn.Sequential(total, nn.PReLU(8))


class OverParameterized(nn.Module):
    """A k x k conv with kernel W o D, made at every call; D starts as the identity."""

    def __init__(self, width: int, out: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        taps = kernel * kernel
        self.shape, self.groups, self.padding = (out, width // groups, kernel, kernel), groups, 1
        self.W = nn.Parameter(torch.randn(out, width // groups, taps) / taps)
        self.D = nn.Parameter(torch.zeros(width, taps, taps))
        eye = torch.eye(taps).repeat(width, 1, 1)
        self.D_diag = nn.Parameter(eye, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        W = torch.reshape(self.W, (self.shape[0] // self.groups, -1, self.W.shape[2]))
        kernel = torch.einsum("ims,ois->oim", self.D + self.D_diag, W).reshape(self.shape)
        return F.conv2d(x, kernel, self.bias, padding=self.padding, groups=self.groups)


@published("DO-Conv", "Cao et al., 2020")
def do_conv() -> nn.Module:
    return nn.Sequential(OverParameterized(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU())


@published("DO-Conv, groups 2, no norm", "Cao et al., 2020")
def do_conv_grouped() -> nn.Module:
    return OverParameterized(8, 12, 3, 2)


@published("ExpandNet-CL: 1 x 1 - 3 x 3 - 1 x 1", "Guo et al., NeurIPS 2020")
def expandnet_cl() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 32, 1, padding=1, bias=False), nn.Conv2d(32, 48, 3, bias=False),
        nn.Conv2d(48, 12, 1), nn.BatchNorm2d(12), nn.ReLU(),
    )  # fmt: skip


@published("ExpandNet-CK: 7 x 7 as three 3 x 3", "Guo et al., NeurIPS 2020")
def expandnet_ck() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=3), nn.Conv2d(32, 48, 3), nn.Conv2d(48, 12, 3, stride=2),
        nn.BatchNorm2d(12), nn.ReLU(),
    )  # fmt: skip


@published("ExpandNet-FC", "Guo et al., NeurIPS 2020", convs=1)
def expandnet_fc() -> nn.Module:
    linears = [nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 5)]
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *linears)


@published("reparameterized residual: pad, 1 x 1 - 3 x 3 - 1 x 1", "Du et al., CVPRW 2022 (FMEN)")
def fmen() -> nn.Module:
    stack = nn.Sequential(
        nn.ZeroPad2d(1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 8, 1)
    )
    return nn.Sequential(Sum(stack, nn.Identity()), nn.LeakyReLU(0.05))
