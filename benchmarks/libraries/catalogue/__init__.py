"""Which models there are: by library, how each is made small, and what it is called with."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from torch import Tensor

from benchmarks.libraries.catalogue.classification import classification
from benchmarks.libraries.catalogue.entry import Entry as Entry
from benchmarks.libraries.catalogue.images_made import diffusion, enlarging, restoration
from benchmarks.libraries.catalogue.medical import medical
from benchmarks.libraries.catalogue.seeing import detection, matching, understanding
from benchmarks.libraries.catalogue.segmentation import segmentation
from benchmarks.libraries.catalogue.sounds import hearing, parting, speaking

_PARTS = (
    *(enlarging, restoration, hearing, speaking, parting, matching, medical),
    *(understanding, diffusion, detection, segmentation, classification),
)


def entries() -> dict[str, Entry]:
    """Every model by its key, library:name; of each library the first, then of each the second.

    So a run that is interrupted has seen all libraries.
    """
    turns = zip_longest(*(part() for part in _PARTS))
    return {f"{e.library}:{e.name}": e for turn in turns for e in turn if e is not None}


def outputs_of(value: Any) -> list[Tensor]:
    """The tensors that a model returns, whatever holds them."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value
    if isinstance(parts, str) or not hasattr(parts, "__iter__"):
        return [t for t in vars(value).values() if isinstance(t, Tensor)] if value else []
    return [tensor for part in parts for tensor in outputs_of(part)]
