"""Which axes of an input are a height and a width, and what those are called in a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

# What the last axes of an image, or of a volume, are called in a file.
_AXES = ("depth", "height", "width")


def is_image(leaf: Any) -> bool:
    """Whether an input has a height and a width: 4 axes, or 5 with a depth."""
    return isinstance(leaf, Tensor) and leaf.dim() in (4, 5)


def axis_names(dimensions: int) -> dict[int, str]:
    """Names the axes of an image, by their index: {2: "height", 3: "width"}."""
    names = _AXES[-(dimensions - 2) :]
    return dict(enumerate(names, start=2))


def size_symbols(shapes: Iterable[tuple[str, Sequence[Any]]]) -> dict[str, str]:
    """Names the symbols of images' axes: height, width; with the input's name
    where a second image has sizes of its own; `size` where height and width are one symbol.

    shapes: the name and the axes (a symbol's name, or a number) of each input.
    """
    names: dict[str, str] = {}
    for name, axes in shapes:
        if len(axes) not in (4, 5):
            continue
        for index, axis in axis_names(len(axes)).items():
            if not isinstance(axes[index], str) or not axes[index]:
                continue
            called = "size" if list(axes[2:]).count(axes[index]) > 1 else axis
            taken = called in names.values()
            names.setdefault(axes[index], f"{name}_{called}" if taken else called)
    return names


def renamed(text: str, names: dict[str, str]) -> str:
    """Renames the symbols in a shape's expression, such as 4*s7, all at once."""
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), text)
