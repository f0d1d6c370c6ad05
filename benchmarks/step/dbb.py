"""The diverse branch block on feature maps, a norm in every branch (Ding et al. 2021)."""

from __future__ import annotations

from torch import Tensor, nn

# A conv and the norm behind it, as torchvision and timm name them.
NORM_OF = {"conv": "bn", "conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "0": "1"}

IMAGE_CHANNELS = 3


class PaddedNorm(nn.BatchNorm2d):
    """A norm whose output is padded with what it makes of zeros, so that no border is seen."""

    def __init__(self, channels: int, padding: tuple[int, int]) -> None:
        super().__init__(channels)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not any(self.padding):
            return y
        assert self.running_mean is not None
        assert self.running_var is not None
        slope = self.weight.detach() * (self.running_var + self.eps).rsqrt()
        border = (self.bias.detach() - slope * self.running_mean).reshape(1, -1, 1, 1)
        (h, w), (rows, columns) = self.padding, y.shape[2:]
        padded = border.expand(*y.shape[:2], rows + 2 * h, columns + 2 * w).to(y).clone()
        padded[:, :, h : h + rows, w : w + columns] = y
        return padded


class DiverseBranchBlock(nn.Module):
    """k x k, 1 x 1, 1 x 1 - k x k and 1 x 1 - average pool, each with its norms, added."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        out, width, groups = conv.out_channels, conv.in_channels, conv.groups
        stride, size = conv.stride, conv.kernel_size
        assert not isinstance(conv.padding, str)
        pads = (conv.padding[0], conv.padding[1])

        def layer(read: int, made: int, taps: object, **options: object) -> nn.Conv2d:
            return nn.Conv2d(read, made, taps, groups=groups, bias=False, **options)  # type: ignore[arg-type]

        origin = layer(width, out, size, stride=stride, padding=pads)
        branches = [nn.Sequential(origin, nn.BatchNorm2d(out))]
        pool = nn.AvgPool2d(size, stride)  # type: ignore[arg-type]
        if groups == width:  # depthwise: a 1 x 1 conv adds nothing
            pooled = nn.AvgPool2d(size, stride, pads)  # type: ignore[arg-type]
            branches.append(nn.Sequential(pooled, nn.BatchNorm2d(out)))
        else:
            branches += [
                nn.Sequential(layer(width, out, 1, stride=stride), nn.BatchNorm2d(out)),
                nn.Sequential(
                    layer(width, out, 1), PaddedNorm(out, pads), pool, nn.BatchNorm2d(out)
                ),
                nn.Sequential(
                    layer(width, width, 1),
                    PaddedNorm(width, pads),
                    layer(width, out, size, stride=stride),
                    nn.BatchNorm2d(out),
                ),
            ]
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        total: Tensor = first(x)
        for branch in others:
            total = total + branch(x)
        return total


def with_diverse_branches(model: nn.Module) -> nn.Module:
    """The model with a block in the place of each k x k conv (1 < k < 7) and its norm, in place.

    A conv that reads images stays: torch 2.13 writes beyond its memory in the backward of the 1 x 1
    conv with stride 2 on three channels that its block would have.
    """
    for parent in list(model.modules()):
        for name, norm in NORM_OF.items():
            conv = getattr(parent, name, None)
            if not isinstance(conv, nn.Conv2d) or not 1 < conv.kernel_size[0] < 7:
                continue
            if conv.in_channels == IMAGE_CHANNELS:
                continue
            behind = getattr(parent, norm)
            kept = behind.act if hasattr(behind, "act") else nn.Identity()
            setattr(parent, name, DiverseBranchBlock(conv))
            setattr(parent, norm, kept)
    return model
