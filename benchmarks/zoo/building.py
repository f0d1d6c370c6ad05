"""Which models there are, and how to build one fast: without its initialization, or shallower."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any
from unittest import mock

import timm
import torch
import torchvision
from timm.models import _registry
from torch import nn
from torch.overrides import TorchFunctionMode

BLOCKS_KEPT = 2  # of a run of equal blocks, in a depth-reduced model

_IN_PLACE = {
    *("normal_", "uniform_", "erfinv_", "trunc_normal_", "mul_", "add_", "div_", "sub_"),
    *("clamp_", "fill_", "zero_", "copy_", "bernoulli_"),
}
# Detectors resize their images and look at a thousand boxes; small ones show the same convs.
_SMALL_IMAGES: dict[str, Any] = {"min_size": 128, "max_size": 160}
_FEW_BOXES: dict[str, Any] = {
    "rpn_pre_nms_top_n_train": 64,
    "rpn_pre_nms_top_n_test": 64,
    "rpn_post_nms_top_n_train": 16,
    "rpn_post_nms_top_n_test": 16,
    "box_batch_size_per_image": 16,
}


@dataclass(frozen=True)
class Subject:
    """One model of a library. family: timm's module, or torchvision's group of models."""

    library: str
    name: str
    family: str

    @property
    def key(self) -> str:
        return f"{self.library}:{self.name}"


def subjects(*only: str) -> list[Subject]:
    """Every model of both libraries whose key (timm:resnet18) or name fits one of the globs."""
    modules = _registry._model_to_module
    found = [Subject("timm", name, modules[name]) for name in timm.list_models()]
    for name in torchvision.models.list_models():
        place = torchvision.models.get_model_builder(name).__module__
        found.append(Subject("torchvision", name, place.split(".")[2]))
    return [s for s in found if any(fnmatch.fnmatch(t, g) for t in (s.key, s.name) for g in only)]


def build(subject: Subject, **options: Any) -> nn.Module:
    """The model without pretrained weights, in eval mode. Its parameters hold no sensible values.

    The buffers that constructors compute are real.
    """
    torch.manual_seed(0)
    # The one initialization of torch that a function mode sees only the insides of.
    truncated = mock.patch.object(nn.init, "trunc_normal_", lambda tensor, *size, **sizes: tensor)
    with truncated, _NoInitialization():
        if subject.library == "timm":
            return timm.create_model(subject.name, **options).eval()
        return _vision(subject.name, options).eval()


def _vision(name: str, options: dict[str, Any]) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    place = builder.__module__
    if "weights_backbone" in inspect.signature(builder).parameters:
        options = {"weights_backbone": None, **options}
    if ".detection." in place and "ssd" not in place:
        options = {**_SMALL_IMAGES, **options}
    if "rcnn" in place:
        options = {**_FEW_BOXES, **options}
    return torchvision.models.get_model(name, weights=None, **options)


class _NoInitialization(TorchFunctionMode):
    """Leaves a new parameter as it was allocated: filling it twice would take most of the time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        tensor = args[0] if args else given.get("tensor")
        if isinstance(tensor, nn.Parameter):
            name = getattr(func, "__name__", "")
            if name in _IN_PLACE or getattr(func, "__module__", "") == "torch.nn.init":
                return tensor
        return func(*args, **given)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shorten(model: nn.Module) -> int:
    """Leave the first two of each run of equal blocks, in place; says how many blocks went.

    Equal: neighbours under one parent, of one class, whose state has the same names and shapes.
    """
    gone = 0
    for parent in list(model.modules()):
        kept: list[tuple[str, nn.Module | None]] = []
        for _, run in groupby(parent._modules.items(), key=lambda item: _form(item[1])):
            blocks = list(run)
            is_block = any(True for _ in blocks[0][1].children()) if blocks[0][1] else False
            kept += blocks[:BLOCKS_KEPT] if is_block else blocks
        if len(kept) < len(parent._modules):
            gone += len(parent._modules) - len(kept)
            is_numbered = isinstance(parent, (nn.Sequential, nn.ModuleList))
            parent._modules = {
                str(number) if is_numbered and name.isdigit() else name: module
                for number, (name, module) in enumerate(kept)
            }
    return gone


def _form(module: nn.Module | None) -> object:
    if module is None:
        return None
    shapes = tuple((name, tuple(t.shape)) for name, t in module.state_dict().items())
    return (type(module), shapes)


def without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """The model on the meta device, where only its size and its form are asked for."""
    try:
        with torch.device("meta"):
            return make()
    except Exception:  # a constructor that computes with its tensors
        return make()


def smaller_siblings(subject: Subject, model: nn.Module) -> Iterator[Subject]:
    """Models of the same family and class, the smallest first."""
    found = []
    for other in subjects(f"{subject.library}:*"):
        if other.family == subject.family and other != subject:
            sibling = without_values(partial(build, other))
            if type(sibling) is type(model):
                found.append((parameter_count(sibling), other))
    return (other for _, other in sorted(found, key=lambda pair: pair[0]))
