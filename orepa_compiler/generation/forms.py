"""Groups blocks by form: what they must share for their kernels to be made together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orepa_compiler.branches import DepthwisePointwise
from orepa_compiler.generation.stacking import Layout, layout_of


@dataclass(frozen=True)
class BlockForm:
    """All of a block but its values.

    kinds: of the branches. rows: theirs in the scaling parameter. scaling, parameters, kernel:
    where the scaling parameter, those of each branch, and W_e lie in memory.
    """

    kinds: tuple[type, ...]
    rows: tuple[int, ...]
    scaling: Layout | None
    parameters: tuple[tuple[Layout, ...], ...]
    kernel: Layout
    groups: int
    dtype: torch.dtype
    device: torch.device

    @property
    def last(self) -> bool:
        return self.kernel.last

    @property
    def rows_out(self) -> int:
        """Output channels."""
        return self.kernel.shape[0]

    @property
    def width(self) -> int:
        """Input channels of a group."""
        return self.kernel.shape[1]

    @property
    def taps(self) -> int:
        return self.kernel.shape[2:].numel()

    def places(self) -> list[Layout]:
        """Of all values: the scaling parameter, if there is one, and the others."""
        flat = [place for own in self.parameters for place in own]
        return flat if self.scaling is None else [self.scaling, *flat]

    def of_kind(self, *kinds: type) -> list[int]:
        """The numbers of the branches of these kinds."""
        return [number for number, kind in enumerate(self.kinds) if kind in kinds]

    def first(self, branch: int) -> int:
        """The number of a branch's first parameter among all."""
        return sum(map(len, self.parameters[:branch]))


def block_form(
    branches: Sequence[Any],
    rows: Sequence[int],
    scaling: Tensor | None,
    parameters: Sequence[Sequence[Tensor]],
) -> BlockForm | None:
    """The form of a block, or None where a parameter is neither contiguous nor channels_last.

    parameters: of each branch.
    """
    places = [[layout_of(parameter) for parameter in own] for own in parameters]
    of_scaling = None if scaling is None else layout_of(scaling)
    found = tuple(tuple(p for p in own if p is not None) for own in places)
    is_odd = any(None in own for own in places) or (scaling is not None and of_scaling is None)
    if is_odd:
        return None
    first = parameters[0][0]
    return BlockForm(
        tuple(type(branch) for branch in branches),
        tuple(rows),
        of_scaling,
        found,
        _kernel_place(branches[0], parameters),
        branches[0].groups,
        first.dtype,
        first.device,
    )


def _kernel_place(branch: Any, parameters: Sequence[Sequence[Tensor]]) -> Layout:
    """Where W_e lies: as a parameter of its shape, one with channels last if there is one."""
    inner, outer = parameters[0][0], parameters[0][-1]
    is_separable = isinstance(branch, DepthwisePointwise)
    width = branch.in_channels // branch.groups if is_separable else inner.shape[1]
    shape = torch.Size((outer.shape[0], width, *branch.kernel_size))
    flat = [parameter for own in parameters for parameter in own if parameter.shape == shape]
    alike = [place for place in map(layout_of, flat) if place is not None]
    contiguous = Layout(shape, torch.empty(shape, device="meta").stride())
    return max(alike, key=lambda place: place.last, default=contiguous)
