"""The published blocks: what each is called, how to make one, and what is to become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Published:
    """A block of the field in training form.

    make: one with the published geometry, small. shape: of one input, without the batch. convs: how
    many are left after collapse. refused: the border, or whatever else keeps a part of it apart;
    None where all of it is to be collapsed.
    """

    name: str
    source: str
    make: Callable[[], nn.Module]
    convs: int
    shape: tuple[int, ...] = (8, 16, 16)
    refused: str | None = None


BLOCKS: dict[str, Published] = {}


def published(
    name: str,
    source: str,
    *,
    convs: int = 1,
    shape: tuple[int, ...] = (8, 16, 16),
    refused: str | None = None,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Adds the block that the function makes to BLOCKS."""

    def add(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert name not in BLOCKS
        BLOCKS[name] = Published(name, source, make, convs, shape, refused)
        return make

    return add


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    groups: int = 1,
    *,
    norm: type[nn.Module] = nn.BatchNorm2d,
) -> nn.Sequential:
    """A conv without a bias, and its norm."""
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
    )
    return nn.Sequential(conv, norm(out_channels))


class SqueezeExcite(nn.Module):
    """x sigmoid(W_2 relu(W_1 mean(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * gate


class Sum(nn.Module):
    """The branches on one input, added."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            total = total + branch(x)
        return total
