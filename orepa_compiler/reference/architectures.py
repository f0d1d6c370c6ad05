"""Builds the stock networks of the authors' code, and finds their parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ReparamError
from orepa_compiler.model_source import declare_torchvision_operators

# What installs torchvision and timm.
EXTRA = "models"
IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class Place:
    """Where the authors' code keeps a conv with its norm, and where the stock network does.

    name: their module. conv, norm: the stock conv and the norm behind it; no norm where the stock
    conv has a bias instead. beside: their explicit branches beside it -> stock modules.
    """

    name: str
    conv: str
    norm: str | None
    beside: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """A network of the authors' code.

    name: as their code calls it. build: the stock network. places: its convs. classifier: its last
    layer. build_collapsed: the stock network where blocks are single convs with a bias, if its
    blocks have explicit branches.
    """

    name: str
    build: Callable[[], nn.Module]
    places: Callable[[nn.Module], Iterator[Place]]
    classifier: str
    build_collapsed: Callable[[], nn.Module] | None = None
    aliases: tuple[str, ...] = ()


def architecture_named(arch: str) -> Architecture:
    """The architecture of this name, upper or lower case, with or without hyphens.

    Raises ReparamError for a name that is none.
    """
    for architecture in ARCHITECTURES:
        if _plain(arch) in map(_plain, (architecture.name, *architecture.aliases)):
            return architecture
    raise ReparamError(
        f"arch={arch!r} is none of {', '.join(architecture.name for architecture in ARCHITECTURES)}"
    )


def torchvision_net(name: str, *, width: float = 1.0) -> nn.Module:
    """torchvision's network, every layer `width` times as wide."""
    declare_torchvision_operators()
    model: nn.Module = import_extra("torchvision", extra=EXTRA).models.get_model(name)
    return model if width == 1.0 else widened(model, width)


def widened(model: nn.Module, width: float) -> nn.Module:
    """A ResNet with the channels of every layer multiplied, in place; its weights are new."""
    for path, module in list(model.named_modules()):
        owner, _, child = path.rpartition(".")
        if (wide := _wide_layer(module, width)) is not None:
            setattr(model.get_submodule(owner), child, wide)
    return model


def timm_net(name: str) -> nn.Module:
    """timm's network in training form."""
    declare_torchvision_operators()
    model: nn.Module = import_extra("timm", extra=EXTRA).create_model(name)
    return model


def collapsed(build: Callable[[], nn.Module]) -> nn.Module:
    """timm's network in its own deploy form: each block one conv with a bias."""
    model = build()
    for module in list(model.modules()):
        if hasattr(module, "conv_kxk"):
            module.reparameterize()  # type: ignore[operator]
            vars(module).pop("id_tensor", None)  # timm leaves it behind
    return model


def resnet_places(model: nn.Module) -> Iterator[Place]:
    """layer{s}.{j}.conv{n} is theirs as stage{s}.{j}.conv{n}, the downsampling as shortcut."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        name = path.replace("layer", "stage").replace("downsample.0", "shortcut")
        norm = path.replace("conv", "bn").replace("downsample.0", "downsample.1")
        yield Place(name if "." in name else f"stage0.{name}", path, norm)


def repvgg_places(model: nn.Module) -> Iterator[Place]:
    """stages.{s}.{j} is theirs as stage{s + 1}.{j}, in timm's training and deploy form."""
    for path, _ in model.named_modules():
        block, _, child = path.rpartition(".")
        stage = re.sub(r"^stages\.(\d+)", lambda found: f"stage{int(found[1]) + 1}", block)
        name = "stage0" if block == "stem" else stage
        if child == "reparam_conv":
            yield Place(name, path, None)
        elif child == "conv_kxk":
            pointwise = {
                "rbr_1x1.conv": f"{block}.conv_1x1.conv",
                "rbr_1x1.bn": f"{block}.conv_1x1.bn",
            }
            has_identity = getattr(model.get_submodule(block), "identity", None) is not None
            identity = {"rbr_identity": f"{block}.identity"} if has_identity else {}
            yield Place(name, f"{path}.conv", f"{path}.bn", {**pointwise, **identity})


def _wide_layer(module: nn.Module, width: float) -> nn.Module | None:
    """A layer of a ResNet with its channels multiplied, or None for one without channels."""

    def wide(channels: int) -> int:
        return channels if channels == IMAGE_CHANNELS else int(channels * width)

    if isinstance(module, nn.Conv2d):
        return nn.Conv2d(
            wide(module.in_channels),
            wide(module.out_channels),
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            groups=module.groups,
            bias=False,
        )
    if isinstance(module, nn.BatchNorm2d):
        return nn.BatchNorm2d(wide(module.num_features), module.eps)
    if isinstance(module, nn.Linear):
        return nn.Linear(wide(module.in_features), module.out_features)
    return None


def _resnet(name: str, stock: str, *aliases: str, width: float = 1.0) -> Architecture:
    build = partial(torchvision_net, stock, width=width)
    return Architecture(name, build, resnet_places, "fc", aliases=aliases)


def _repvgg(name: str, stock: str) -> Architecture:
    build = partial(timm_net, stock)
    return Architecture(name, build, repvgg_places, "head.fc", partial(collapsed, build))


def _plain(name: str) -> str:
    return "".join(letter for letter in str(name).lower() if letter.isalnum() or letter == ".")


ARCHITECTURES = (
    _resnet("ResNet-18", "resnet18"),
    _resnet("ResNet-34", "resnet34"),
    _resnet("ResNet-50", "resnet50"),
    _resnet("ResNet-101", "resnet101"),
    _resnet("ResNet-18-1.5x", "resnet18", "WideResNet-18-1.5x", width=1.5),
    _resnet("ResNet-18-2x", "resnet18", "WideResNet-18-2x", width=2.0),
    _resnet("ResNeXt-50", "resnext50_32x4d", "ResNeXt-50-32x4d"),
    _repvgg("RepVGG-A0", "repvgg_a0"),
    _repvgg("RepVGG-A1", "repvgg_a1"),
    _repvgg("RepVGG-A2", "repvgg_a2"),
)
