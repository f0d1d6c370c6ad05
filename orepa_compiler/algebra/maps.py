"""Names the maps that an operator reads and gives: their channels, and the axis of these.

Two operators meet only where they mean the same axis. Equal sizes are no proof of that: a linear
layer on (N, T, C) and a conv on (N, C, T) both run where T = C.
"""

from __future__ import annotations

from dataclasses import dataclass

from orepa_compiler.errors import NotLinear

SECOND, LAST, ANY = "second", "last", "any"


@dataclass(frozen=True)
class Axes:
    """Where the channels of a map stand.

    place: second, as for convs and norms, (N, C, ...); last, as for nn.Linear, (..., C); or any,
    for what treats all numbers alike. ranks: how many axes may stand behind channels that are
    second; None: any number.
    """

    place: str
    ranks: frozenset[int] | None = None

    @property
    def rank(self) -> int | None:
        """The number of axes behind the channels, if there is but one possible."""
        return next(iter(self.ranks)) if self.ranks is not None and len(self.ranks) == 1 else None

    def meet(self, other: Axes) -> Axes:
        """The axes that suit both. Raises NotLinear where there are none."""
        if ANY in (self.place, other.place):
            return other if self.place == ANY else self
        if self.place != other.place:
            if {self.rank, other.rank} != {0}:  # (N, C): there the second axis is the last
                raise NotLinear(
                    "a linear layer works on the last axis, a conv or a norm on the second; they "
                    "may be joined only where maps are known to be (N, C), as behind flatten(0, 1)"
                )
            return TOKENS
        if self.ranks is None or other.ranks is None:
            return other if self.ranks is None else self
        common = self.ranks & other.ranks
        if not common:
            raise NotLinear(f"a layer for {self} cannot meet one for {other}")
        return Axes(self.place, common)

    def __str__(self) -> str:
        if self.ranks is None:
            return "maps of any rank"
        if self.place == LAST:
            return "tokens"
        return " or ".join(f"{rank}-d" for rank in sorted(self.ranks)) + " maps"


# What nn.Linear reads: the channels are last, so no axis stands behind them.
TOKENS = Axes(LAST, frozenset({0}))
# What the identity reads.
ANYTHING = Axes(ANY)


def second(*ranks: int) -> Axes:
    """Channels on the second axis, with one of these numbers of axes behind them; none: any."""
    return Axes(SECOND, frozenset(ranks) if ranks else None)


def kernel_axes(rank: int) -> Axes:
    """The axes of a kernel with this many axes of its own; one without any is a linear layer's."""
    return second(rank) if rank else TOKENS


@dataclass(frozen=True)
class Maps:
    """The maps that an operator reads, or gives."""

    channels: int
    axes: Axes

    def meet(self, other: Maps) -> Maps:
        """The maps that are both. Raises NotLinear where there are none."""
        if self.channels != other.channels:
            raise NotLinear(f"maps of {self.channels} channels are none of {other.channels}")
        return Maps(self.channels, self.axes.meet(other.axes))
