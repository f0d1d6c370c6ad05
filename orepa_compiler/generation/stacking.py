"""Lays tensors of equal blocks side by side in memory, so that one operation reaches all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Slot = Sequence[Tensor]


def stacked(slots: Sequence[Slot]) -> list[Tensor]:
    """Each slot's tensors one after the other, (tensors, numbers), in their order in memory.

    All slots are copied by one operation; one that holds a single tensor is not copied.
    """
    several = [slot for slot in slots if len(slot) > 1]
    joined: Iterator[Tensor] = iter(())
    if several:
        flat = torch.cat([in_memory(tensor) for slot in several for tensor in slot])
        joined = iter(flat.split([len(slot) * slot[0].numel() for slot in several]))
    return [
        next(joined).view(len(slot), -1) if len(slot) > 1 else in_memory(slot[0]).unsqueeze(0)
        for slot in slots
    ]


def in_memory(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that is contiguous or channels_last, as they lie in memory."""
    return (tensor if tensor.is_contiguous() else tensor.movedim(1, -1)).reshape(-1)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory. last: with its channels last, where that shows."""

    shape: torch.Size
    strides: tuple[int, ...]
    last: bool = False


def layout_of(tensor: Tensor) -> Layout | None:
    """The tensor's place; None where it is neither contiguous nor channels_last."""
    last = not tensor.is_contiguous()
    if last and not (tensor.dim() > 2 and tensor.movedim(1, -1).is_contiguous()):
        return None
    return Layout(tensor.shape, tensor.stride(), last)


def handed_out(stack: Tensor, place: Layout) -> list[Tensor]:
    """The stack's rows as views, at the place of what they are for.

    With its strides, not only its layout: an optimizer goes over a list of tensors in one operation
    only where gradients have those of the parameters, also on axes of length one.
    """
    rows = stack.reshape(stack.shape[0], -1).unbind()
    return [row.as_strided(place.shape, place.strides) for row in rows]
