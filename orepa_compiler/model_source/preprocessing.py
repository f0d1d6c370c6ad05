"""Reads how an image becomes the input of a model, by what timm or torchvision say of it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ReparamError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

# What models of ImageNet are mostly trained with, where nothing says otherwise.
_MEAN, _STD, _SIZE, _CROP_SHARE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 0.875


@dataclass(frozen=True)
class Preprocessing:
    """An image's way to a tensor: the shorter side to `resize`, the middle of `crop`, normalized.

    crop: height and width. mean, std: of each channel, on a scale from 0 to 1. known: whether
    timm or torchvision say so of this very model.
    """

    resize: int = round(_SIZE / _CROP_SHARE)
    crop: tuple[int, int] = (_SIZE, _SIZE)
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    interpolation: str = "bilinear"
    known: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an input, without the batch."""
        return (len(self.mean), *self.crop)

    def __str__(self) -> str:
        mean, std = (",".join(f"{value:g}" for value in side) for side in (self.mean, self.std))
        height, width = self.crop
        return f"resize {self.resize}, crop {height}x{width}, mean {mean}, std {std}"

    def __call__(self, path: Path) -> Tensor:
        """An image file as (channels, height, width). Raises ReparamError for any other file."""
        image_module = import_extra("PIL.Image", extra="models")
        try:
            with image_module.open(path) as image:
                return self._tensor(image.convert("L" if len(self.mean) == 1 else "RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise ReparamError(f"{path}: not an image that can be read ({error})") from error

    def _tensor(self, image: Any) -> Tensor:
        resampling = import_extra("PIL.Image", extra="models").Resampling
        how = getattr(resampling, self.interpolation.upper(), resampling.BILINEAR)
        scale = self.resize / min(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], how)
        height, width = self.crop
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))  # black where it is too small
        values = np.asarray(image, dtype=np.float32) / 255
        pixels = torch.from_numpy(np.atleast_3d(values).copy()).permute(2, 0, 1)
        mean, std = (torch.tensor(side).reshape(-1, 1, 1) for side in (self.mean, self.std))
        return (pixels - mean) / std

    def at(self, shape: tuple[int, ...]) -> Preprocessing:
        """The same for inputs of another shape, (channels, height, width)."""
        if len(shape) != 3 or shape == self.shape:
            return self
        channels, height, width = shape
        share = min(self.crop) / self.resize
        mean, std = (
            side if len(side) == channels else (sum(side) / len(side),) * channels
            for side in (self.mean, self.std)
        )
        resize = max(height, width, round(min(height, width) / share))
        return replace(self, resize=resize, crop=(height, width), mean=mean, std=std)


def preprocessing_of(source: str, model: nn.Module | None = None) -> Preprocessing:
    """What timm or torchvision say of the model that `source` names, else ImageNet's usual.

    A model of timm that a factory of the user's own returns says it too.
    """
    place, _, name = source.rpartition(":")
    found = getattr(model, "pretrained_cfg", None)
    if isinstance(found, dict) and len(found.get("input_size") or ()) == 3:
        return _of_timm(found)
    if place == "torchvision":
        return _of_torchvision(name) or Preprocessing()
    return Preprocessing()


def _of_timm(found: dict[str, Any]) -> Preprocessing:
    channels, height, width = found["input_size"]
    mean, std = tuple(found.get("mean") or _MEAN), tuple(found.get("std") or _STD)
    share = found.get("crop_pct") or _CROP_SHARE
    if len(mean) != channels or len(std) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return Preprocessing(
        resize=int(min(height, width) / share),
        crop=(height, width),
        mean=mean,
        std=std,
        interpolation=found.get("interpolation") or "bilinear",
        known=True,
    )


def _of_torchvision(name: str) -> Preprocessing | None:
    models = importlib.import_module("torchvision.models")
    try:
        told = models.get_model_weights(name).DEFAULT.transforms()
        (crop,), (resize,) = told.crop_size, told.resize_size
    except (AttributeError, ValueError, TypeError):  # detectors take any size, videos another
        return None
    return Preprocessing(
        resize, (crop, crop), tuple(told.mean), tuple(told.std), told.interpolation.value, True
    )
