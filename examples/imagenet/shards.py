"""Images in WebDataset shards: tar files that hold KEY.jpg and KEY.cls, one behind the other."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

IMAGES, CLASS = frozenset({".jpg", ".jpeg", ".png", ".webp"}), ".cls"


class Shards(Dataset[tuple[Tensor, int]]):
    """Any image of the shards by its number, so that order and resuming are those of a folder.

    The headers of all shards are read once, which takes minutes for the whole of ImageNet. Images
    are read where they lie; nothing is unpacked.

    Raises ValueError for a folder without shards, and for an image without a class or the reverse.
    """

    def __init__(self, folder: Path, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            raise ValueError(f"{folder}: no shard (*.tar) there")
        self.places = [place for shard in shards for place in _places(shard)]
        self.classes = 1 + max(label for *_, label in self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        shard, start, size, label = self.places[index]
        with shard.open("rb") as file:
            file.seek(start)
            data = file.read(size)
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB")), label


def _places(shard: Path) -> Iterator[tuple[Path, int, int, int]]:
    """Of each image: its shard, where it begins and how long it is, and its class."""
    found: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with tarfile.open(shard) as archive:
        for member in archive:
            # a key ends at the first dot of the file's name, not at one of its folder's
            name = PurePosixPath(member.name)
            stem, _, ending = name.name.partition(".")
            key = str(name.with_name(stem))
            if f".{ending}".lower() in IMAGES:
                found[key] = member.offset_data, member.size
            elif f".{ending}" == CLASS and (text := archive.extractfile(member)):
                labels[key] = int(text.read())
    if odd := sorted(found.keys() ^ labels.keys()):
        raise ValueError(f"{shard}: {odd[0]} has no image or no {CLASS}; each sample needs both")
    for key, (start, size) in found.items():
        yield shard, start, size, labels[key]
