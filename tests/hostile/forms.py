"""What a hostile model is: how it is made and called, and what must be reached with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels, height, width and batch alike: an axis that is taken for another then still fits.
SIZE = 8
Call = Callable[[nn.Module], Any]


def images(*shape: int) -> Tensor:
    """A batch of maps in float64, the same in each call."""
    generator = torch.Generator().manual_seed(3)
    shape = shape or (SIZE, SIZE, SIZE, SIZE)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Form:
    """One model of a kind.

    inputs: as the verbs take them; a tuple holds the arguments. calls: what is compared, in order,
    on one copy; none is the model on its inputs, with gradients, without, and with again. varies:
    it is random on purpose and must stay so. before: puts back what the model keeps outside
    itself. norms: at most so many are left after collapse. blocks: at least so many convs are
    expanded. told: that holds where inputs are given only. double: it is run in float64.
    trains: a step can be taken with it; some writes in place are for inference only.
    """

    make: Callable[[], nn.Module]
    inputs: Any = None
    calls: tuple[Call, ...] = ()
    varies: bool = False
    before: Callable[[], None] | None = None
    norms: int | None = None
    blocks: int | None = None
    told: bool = False
    double: bool = True
    trains: bool = True

    def given(self) -> Any:
        """The inputs, a copy of their own for each reader."""
        return images() if self.inputs is None else copy.deepcopy(self.inputs)

    def arguments(self) -> tuple[Any, ...]:
        given = self.given()
        return given if isinstance(given, tuple) else (given,)

    def compared(self) -> tuple[Call, ...]:
        if self.calls:
            return self.calls

        def plain(model: nn.Module) -> Any:
            return model(*self.arguments())

        def without_gradients(model: nn.Module) -> Any:
            with torch.no_grad():
                return model(*self.arguments())

        return plain, without_gradients, plain


def conv(c_in: int = SIZE, c_out: int = SIZE, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


class Pair(nn.Module):
    """A conv with its norm, as children: what a compiler is built to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(SIZE)

    def forward(self, x: Any) -> Any:
        return F.relu(self.norm(self.conv(x)))


class Branches(nn.Module):
    """Two convs of one map and the norm behind their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.norm = conv(), conv(kernel=1), nn.BatchNorm2d(SIZE)

    def forward(self, x: Any) -> Any:
        return self.norm(self.large(x) + self.small(x))
