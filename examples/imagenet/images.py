"""The images: a folder for each class, WebDataset shards, or synthetic ones that need no files."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shards import Shards
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from orepa_compiler.model_source import declare_torchvision_operators

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The shorter side of a validation image, beside the crop: 256 to 224.
_RESIZE = 256 / 224


@dataclass(frozen=True)
class Images:
    """Both sets, and how many classes there are."""

    train: Dataset[Any]
    val: Dataset[Any]
    classes: int


class Synthetic(Dataset[tuple[Tensor, int]]):
    """Noise around one pattern for each class: made from the index, the same at every visit."""

    def __init__(self, count: int, classes: int, size: int, *, seed: int) -> None:
        self.count, self.classes, self.seed = count, classes, seed
        generator = torch.Generator().manual_seed(0)
        self.patterns = torch.randn(classes, 3, size, size, generator=generator)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % self.classes
        generator = torch.Generator().manual_seed(self.seed * self.count + index)
        pattern = self.patterns[label]
        return pattern + torch.randn(pattern.shape, generator=generator), label


def synthetic_images(count: int, size: int, *, classes: int = 10) -> Images:
    val = Synthetic(max(count // 4, 1), classes, size, seed=2)
    return Images(Synthetic(count, classes, size, seed=1), val, classes)


def folder_images(path: Path, size: int) -> Images:
    """path/train and path/val, a folder for each class in each, or shards (*.tar).

    Random crops and flips to train, centre crops to validate.
    """
    declare_torchvision_operators()
    from torchvision import datasets, transforms  # synthetic images do without

    normalize = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augment = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(round(size * _RESIZE)), transforms.CenterCrop(size)]
    to_train = transforms.Compose([*augment, *normalize])
    to_validate = transforms.Compose([*centre, *normalize])
    if any((path / "train").glob("*.tar")):
        shards = Shards(path / "train", to_train)
        return Images(shards, Shards(path / "val", to_validate), shards.classes)
    train = datasets.ImageFolder(path / "train", to_train)
    val = datasets.ImageFolder(path / "val", to_validate)
    return Images(train, val, len(train.classes))


class EpochSampler:
    """This process's share of a shuffled set: an order for each epoch, so a resumed run repeats it.

    Whole batches only, so that every process takes the same number of steps.
    """

    def __init__(self, count: int, batch: int, *, rank: int, world: int, seed: int) -> None:
        self.count, self.batch, self.rank, self.world, self.seed = count, batch, rank, world, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.count // (self.batch * self.world)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        for step in range(len(self)):
            start = (step * self.world + self.rank) * self.batch
            yield order[start : start + self.batch].tolist()


def train_loader(images: Images, sampler: EpochSampler, workers: int) -> DataLoader[Any]:
    return DataLoader(
        images.train,
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def val_loader(
    images: Images, batch: int, workers: int, *, rank: int, world: int
) -> DataLoader[Any]:
    """Every image in exactly one process."""
    assert isinstance(images.val, Sized)
    share = Subset(images.val, range(rank, len(images.val), world))
    pinned = torch.cuda.is_available()
    return DataLoader(share, batch, num_workers=workers, pin_memory=pinned)
