"""Describes a map: how many axes it has, where its channels stand, of what type it is.

A constant beside a map means one axis or another, and may widen the map, or change its type: what
x * gamma computes depends on the form of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orepa_compiler.algebra.maps import SECOND, Axes, Maps
from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.errors import NotLinear

_MOST = 8  # axes; a map with more of them is nowhere known


@dataclass(frozen=True)
class MapForm:
    """What is known of a map, at every call.

    maps: its channels, and where they stand. counts: how many axes it may have in all, a batch
    included. dtype: a type of floating point. None: not known. is_batched: whether its first axis
    is a batch, as that of all that a norm reads.
    """

    maps: Maps | None = None
    counts: frozenset[int] = frozenset(range(_MOST + 1))
    dtype: torch.dtype | None = None
    is_batched: bool = False

    def narrowed(self, other: MapForm) -> MapForm:
        """Joins what both know; where they contradict each other, what is known already stays."""
        counts = (self.counts & other.counts) or self.counts
        is_batched = self.is_batched or other.is_batched
        maps = self.maps or other.maps
        if self.maps and other.maps:
            try:
                maps = self.maps.meet(other.maps)
            except NotLinear:
                maps = self.maps
        if maps is not None:
            maps, counts = _agreed(maps, counts, is_batched)
        return MapForm(maps, counts, self.dtype or other.dtype, is_batched)

    @property
    def count(self) -> int | None:
        """The number of axes, if there is but one possible."""
        return next(iter(self.counts)) if len(self.counts) == 1 else None


NOTHING = MapForm()


def at_least(count: int) -> frozenset[int]:
    """So many axes, or more."""
    return frozenset(range(count, _MOST + 1))


def _agreed(maps: Maps, counts: frozenset[int], is_batched: bool) -> tuple[Maps, frozenset[int]]:
    """The ranks that so many axes allow, and the numbers of axes that these ranks allow."""
    ranks = maps.axes.ranks
    if is_batched and maps.axes.place == SECOND:
        fitting = frozenset(count - 2 for count in counts if count >= 2)
        ranks = (fitting if ranks is None else ranks & fitting) or ranks
        maps = Maps(maps.channels, Axes(SECOND, ranks))
        allowed = counts if ranks is None else frozenset(rank + 2 for rank in ranks)
    else:
        allowed = at_least(min(ranks or {0}) + 1)
    return maps, (counts & allowed) or counts


def identity_of(form: MapForm, device: torch.device) -> ConvOperator:
    """The operator that does nothing to such maps. Raises NotLinear where they are not known."""
    if form.maps is None:
        raise NotLinear("the number of channels that it sees is not known")
    like = torch.empty((), dtype=torch.float64, device=device)
    return identity(form.maps.channels, form.maps.axes, like=like)


def beside_channels(value: Tensor, form: MapForm) -> Tensor:
    """A constant beside a map as one number for each channel, (C,).

    Its axes are counted from the right, as torch does. Raises NotLinear where it is anything else:
    a number for each row or position, or what would give the map more axes or channels.
    """
    maps = form.maps
    if maps is None:
        raise NotLinear("the number of channels that it sees is not known")
    rank = maps.axes.rank
    # (1, C, 1, 1): like a norm, a constant with an axis for the batch is taken to read batches
    has_batch = rank is not None and value.dim() == rank + 2 and value.numel() > 1
    has_batch = has_batch and value.shape[0] == 1
    if value.dim() > min(form.counts) and not has_batch:
        raise NotLinear(
            f"a constant with {value.dim()} axes beside a map that may have {min(form.counts)}, "
            "without a batch, would give it another shape"
        )
    if value.numel() == 1:
        return value.reshape(1).expand(maps.channels)
    if rank is None:
        raise NotLinear("how many axes stand behind the channels of its maps is not known")
    place = value.dim() - 1 - rank
    if place < 0 or value.numel() != value.shape[place] or value.numel() != maps.channels:
        raise NotLinear(
            f"a constant of shape {tuple(value.shape)} is not one number for each of the "
            f"{maps.channels} channels"
        )
    return value.flatten()


def check_type(constant: Any, form: MapForm) -> None:
    """Checks that a map of floating point keeps its type beside a constant; or NotLinear."""
    if form.dtype is None:
        raise NotLinear("what it reads is not known to be of floating point")
    if not isinstance(constant, Tensor) or constant.dim() == 0:
        return
    if torch.promote_types(form.dtype, constant.dtype) != form.dtype:
        raise NotLinear(
            f"beside a constant of {constant.dtype} a map of {form.dtype} changes its type"
        )
