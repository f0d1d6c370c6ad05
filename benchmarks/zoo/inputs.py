"""The smallest input that a model takes, found by trying; and the model made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import detection
from benchmarks.zoo.building import Subject, build, parameter_count, shorten
from benchmarks.zoo.values import RECIPES, Recipe, fill, settling
from orepa_compiler.algebra.classifiers import is_conv_like
from orepa_compiler.verification.nesting import is_finite, tensors_in

# Smaller than 96, and a net of stride 32 has maps on which most of a kernel meets only padding.
SPATIAL_SIZES = (96, 128, 64, 160, 192, 224, 256, 288, 320, 384, 448, 512)
POINTWISE_SIZES = (32, 64, *SPATIAL_SIZES)
_SIZE_OPTIONS: dict[str, tuple[str, ...]] = {
    "timm": ("img_size",),
    "torchvision": ("image_size", "input_size", "spatial_size"),
}
LEAST_SIGNAL = 3e-3  # of the output: how much the two inputs of a batch must differ in theirs
_FRAMES = 16  # S3D pools them by eight, and takes the rest two by two
_AUXILIARY_SIZE = 299  # for heads that run in train mode alone
_IMAGE_SIZE = 128  # of detectors and optical flow
_FLOW_UPDATES = 2


class NotComparable(Exception):
    """No input or no weights were found with which the model has a sensible output."""


@dataclass(frozen=True)
class Instance:
    """A model that can be built again and again, with the input it takes.

    options: of its constructor. shortened: how many blocks were taken out. signal: how much of
    the output depends on the input.
    """

    subject: Subject
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    recipe: Recipe = RECIPES[0]
    shortened: int = 0
    signal: float = 0.0

    def stock(self) -> nn.Module:
        """As its constructor makes it, without sensible weights, in eval mode."""
        model = build(self.subject, **self.options)
        if self.shortened:
            shorten(model)
        return model

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = fill(self.stock(), self.subject.name, self.recipe)
        _settled(self, model)
        return model.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """The positional arguments of one call, a batch of two."""
        family, size = self.subject.family, self.size
        if self.subject.library == "torchvision":
            if family == "detection":
                return (detection.images(size, dtype),)
            if family == "optical_flow":
                return (*_random((2, 2, 3, size, size), dtype), _FLOW_UPDATES)
            if family == "video":
                return (_random((2, 3, _FRAMES, size, size), dtype),)
        return (_random((2, 3, size, size), dtype),)


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def observe(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The model's output tensors in eval mode; a detector's feature maps and head outputs."""
    with torch.no_grad():
        if detection.is_detector(model):
            outputs: Any = detection.inner_outputs(model, inputs[0])
        else:
            outputs = model(*inputs)
    return [tensor.clone() for tensor in tensors_in(outputs)]


def _settled(instance: Instance, model: nn.Module) -> list[Tensor]:
    """The model's outputs, for which the statistics of its norms are made to fit."""
    with settling(model):
        return observe(model, instance.inputs())


def find(instance: Instance) -> tuple[Instance, nn.Module, list[Tensor]]:
    """The instance with its size and recipe, the model, and its outputs.

    Raises NotComparable where no size is taken, or no recipe gives a sensible output.
    """
    reasons: list[str] = []
    for sized, model in _sizes(instance):
        fill(model, sized.subject.name, sized.recipe)
        try:
            outputs = _settled(sized, model)
        except Exception as error:  # a forward is its author's code: anything may come out of it
            reasons.append(f"{sized.size}: {type(error).__name__}: {error}".split("\n")[0][:160])
            continue
        return _sensible(sized, model, outputs)
    raise NotComparable(f"no input size is taken ({'; '.join(reasons[-3:])})")


def _sizes(instance: Instance) -> Iterator[tuple[Instance, nn.Module]]:
    """The instance at each size worth trying, with the model built for it."""
    plain: nn.Module | None = instance.stock()
    assert plain is not None
    if detection.is_detector(plain):
        yield _replace(instance, size=_IMAGE_SIZE), plain
        return
    for size in _candidates(instance.subject, plain):
        for option, value in _size_options(instance.subject, size):
            sized = _replace(instance, options={**instance.options, option: value}, size=size)
            if (model := _try(sized.stock)) is not None:
                plain = None  # a large model's memory is not there twice
                yield sized, model
                break
        else:
            plain = plain or instance.stock()
            yield _replace(instance, size=size), plain


def _replace(instance: Instance, **changes: Any) -> Instance:
    return Instance(**{**vars(instance), **changes})


def _try(build_one: Callable[[], nn.Module]) -> nn.Module | None:
    try:
        return build_one()
    except Exception:  # a constructor that does not know the option, or not this size
        return None


def _size_options(subject: Subject, size: int) -> Iterator[tuple[str, Any]]:
    for option in _SIZE_OPTIONS[subject.library]:
        yield option, size if option.startswith("im") else (size, size)


def _candidates(subject: Subject, model: nn.Module) -> list[int]:
    if subject.library == "torchvision" and subject.family == "optical_flow":
        return [_IMAGE_SIZE]
    convs: list[Any] = [m for m in model.modules() if is_conv_like(m)]
    is_spatial = any(c.kernel_size != c.stride and max(c.kernel_size) > 1 for c in convs)
    default = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1]
    if getattr(model, "aux_logits", False):
        return [_AUXILIARY_SIZE]
    return [*dict.fromkeys((*(SPATIAL_SIZES if is_spatial else POINTWISE_SIZES), default))]


def _sensible(
    instance: Instance, model: nn.Module, outputs: list[Tensor]
) -> tuple[Instance, nn.Module, list[Tensor]]:
    """The first recipe whose outputs are finite and depend on the input."""
    seen: list[str] = []
    for recipe in RECIPES:
        tried = _replace(instance, recipe=recipe)
        if recipe is not instance.recipe:
            fill(model, instance.subject.name, recipe)
            outputs = _settled(instance, model)
        strength = signal(outputs)
        if is_finite(outputs) and strength >= LEAST_SIGNAL:
            return _replace(tried, signal=strength), model, outputs
        seen.append(f"{strength:.1e}" if is_finite(outputs) else "NaN or inf")
    raise NotComparable(f"outputs not finite, or not of the input: signal {', '.join(seen)}")


def signal(outputs: list[Tensor]) -> float:
    """max |y_1 - y_2| / max |y| for the two images of a batch, the largest of all outputs."""
    strengths = [0.0]
    for tensor in outputs:
        if tensor.dim() > 1 and tensor.shape[0] % 2 == 0 and tensor.is_floating_point():
            half = tensor.shape[0] // 2
            size = float(tensor.abs().max())
            strengths.append(float((tensor[:half] - tensor[half:]).abs().max()) / (size or 1.0))
    return max(strengths)


def memory_needed(model: nn.Module, expanded_parameters: int) -> int:
    """Bytes in float32 at the worst moment: two expanded models, or one with its gradients."""
    after = expanded_parameters
    return 4 * max(parameter_count(model) + after, 2 * after)
