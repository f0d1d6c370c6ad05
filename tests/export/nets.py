"""Small nets to export: one of each kind of output, and one for each gate."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tests.norms import randomise_norms


class SmallNet(nn.Module):
    """Grouped, strided and pointwise convs and a residual sum: a collapsed net in little."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )
        self.fc = nn.Linear(8, 5)

    def features(self, image: Tensor) -> Tensor:
        x = self.conv1(image).relu()
        return x + self.block(x)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.features(image).mean((2, 3)))


class DictNet(SmallNet):
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.features(image)
        return {"logits": self.fc(x.mean((2, 3))), "features": x}


class Returns(nn.Module):
    """One conv, and whatever `returned` makes of its input and its output."""

    def __init__(self, returned) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.returned = returned

    def forward(self, image):  # type: ignore[no-untyped-def]
        return self.returned(image, self.conv(image))


class ParallelConvs(nn.Module):
    """A 3x3 conv, a 1x1 conv and an identity, added up: one conv, if only it were collapsed."""

    def __init__(self, groups: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 4, 3, padding=dilation, dilation=dilation)
        self.point = nn.Conv2d(4, 4, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return (self.wide(x) + x + self.point(x)).relu()


def far_apart(spread: float = 1e6) -> nn.Sequential:
    """A conv, and another behind it that takes back how far apart the channels are."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
    with torch.no_grad():
        first.weight[0] *= spread
        second.weight[:, 0] /= spread
    return nn.Sequential(first, nn.ReLU(), second).eval()


def images(batch: int = 2, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def folded_resnet18() -> nn.Module:
    """A ResNet-18 whose norms lie in its convs, as after a collapse."""
    model = randomise_norms(torchvision.models.resnet18()).eval()
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.BatchNorm2d):
                # conv1 and bn1, conv2 and bn2; in a downsample, 0 and 1.
                before = "0" if name == "1" else name.replace("bn", "conv")
                setattr(module, before, fuse_conv_bn_eval(getattr(module, before), child))
                setattr(module, name, nn.Identity())
    return model
