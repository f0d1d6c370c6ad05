"""One model of a library: how it is made, and what it is called with."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = tuple[Any, ...]
Making = Callable[[], Inputs]

# A module of torchvision that is gone, and that basicsr imports one function of.
_MOVED = {"torchvision.transforms.functional_tensor": "torchvision.transforms.functional"}


def images(channels: int = 3, size: int = 64, count: int = 2) -> Inputs:
    return (torch.randn(count, channels, size, size),)


def values(*shape: int) -> Making:
    """One tensor of a shape."""
    return lambda: (torch.randn(shape),)


def volumes(channels: int = 1, size: int = 32) -> Inputs:
    return (torch.randn(1, channels, size, size, size),)


def sound(samples: int = 4000, *axes: int) -> Inputs:
    return (torch.randn(1, *axes, samples),)


@dataclass(frozen=True)
class Entry:
    """One model. place: the module and the name of what makes it. inputs: of one call.

    configuration: the class whose object the model is made of, by its name in the same module.
    """

    library: str
    name: str
    place: str
    options: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[Any, ...] = ()
    configuration: str = ""
    inputs: Making = images

    def home(self) -> Any:
        """The module that holds what makes it, imported: it takes longer than most models."""
        if self.library == "basicsr":
            for gone, there in _MOVED.items():
                sys.modules.setdefault(gone, importlib.import_module(there))
        return importlib.import_module(self.place.rpartition(".")[0])

    def ready(self) -> None:
        """Import all that it needs; a package may import its parts only when they are asked for."""
        for name in filter(None, (self.place.rpartition(".")[2], self.configuration)):
            getattr(self.home(), name)

    def make(self) -> nn.Module:
        """The model, without weights from anywhere, in eval mode."""
        torch.manual_seed(0)
        home, name = self.home(), self.place.rpartition(".")[2]
        made: nn.Module
        if self.configuration:
            made = getattr(home, name)(getattr(home, self.configuration)(**self.options))
        else:
            made = getattr(home, name)(*self.arguments, **self.options)
        return made.eval()
