"""The paper's networks in the forms that it compares: plain, DBB, OREPA."""

from __future__ import annotations

from torch import nn

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.catalogue import OREPA_3X3_REPVGG
from orepa_compiler.errors import ReparamError
from orepa_compiler.reference.architectures import ARCHITECTURES, architecture_named

FORMS = ("plain", "dbb", "orepa")
NAMES = tuple(architecture.name for architecture in ARCHITECTURES)


def network(arch: str, form: str) -> nn.Module:
    """A network with fresh weights, in a form for training from scratch.

    plain: torchvision's or timm's. dbb: a diverse branch block in the place of each 3 x 3
    (Ding et al. 2021). orepa: Hu et al. 2022, Sec. 4.1: every 3 x 3, the 1 x 1 of bottlenecks and
    the 7 x 7 stem; in a RepVGG, the 3 x 3 branch beside the explicit ones (Sec. 4.5).
    """
    architecture = architecture_named(arch)
    model = architecture.build()
    if form == "plain":
        return model
    is_repvgg = architecture.build_collapsed is not None
    if form == "dbb" and is_repvgg:
        raise ReparamError(f"{architecture.name} has branches of its own: form plain or orepa")
    if form == "dbb":
        block = orepa.DBB
        expanded = orepa.expand(model, block=block, where=_is_spatial, init="paper", inplace=True)
        return _without_norms_behind(expanded, block.name)
    if is_repvgg:
        block, where = OREPA_3X3_REPVGG, "*conv_kxk.conv"
        return orepa.expand(model, block=block, where=where, init="paper", inplace=True)
    if any(type(module).__name__ == "BasicBlock" for module in model.modules()):
        return orepa.expand(model, where=_is_no_shortcut, init="paper", inplace=True)
    return orepa.expand(model, init="paper", inplace=True)


def _is_spatial(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


def _is_no_shortcut(path: str, module: nn.Module) -> bool:
    """The authors keep the 1 x 1 shortcuts of basic blocks plain."""
    return "downsample" not in path


def _without_norms_behind(model: nn.Module, name: str) -> nn.Module:
    """A diverse branch block stands for a conv and its norm: every branch has its own."""
    for path, module in list(model.named_modules()):
        if isinstance(module, ConvBlock) and module.block_name == name:
            owner, _, child = path.rpartition(".")
            setattr(model.get_submodule(owner), child.replace("conv", "bn"), nn.Identity())
    return model
