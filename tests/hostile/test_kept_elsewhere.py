"""State that no attribute shows: in iterators, arrays, slots, defaults and functions."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from tests.hostile.forms import Form, Pair, images
from tests.hostile.judging import exact_or_refused

# Whether this call skips the norm, from what the model holds.
Skips = Callable[[Any], bool]


def holding(make: Callable[[], Any], skips: Skips) -> Callable[[], nn.Module]:
    """A model that holds something, and asks it at each call which way to go."""

    class Holding(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.held = make()

        def forward(self, x: Any) -> Any:
            y = self.conv(x)
            return y if skips(self.held) else self.norm(y)

    return Holding


class Slots:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Called:
    """An object that counts when it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls % 2 == 0


def counted(held: Any) -> bool:
    held[0] = (held[0] + 1) % 250
    return held[0] % 2 == 0


def counted_in_slots(held: Slots) -> bool:
    held.calls += 1
    return held.calls % 2 == 0


def grown(held: deque[int]) -> bool:
    held.append(1)
    return len(held) == 2


class InDefault(Pair):
    def forward(self, x: Any, seen: dict[str, int] = {}) -> Any:  # noqa: B006
        seen["calls"] = seen.get("calls", 0) + 1
        y = self.conv(x)
        return self.norm(y) if seen["calls"] % 2 else y


class InDefaultOfHelper(Pair):
    def chosen(self, y: Any, seen: list[int] = []) -> Any:  # noqa: B006
        seen.append(1)
        return self.norm(y) if len(seen) % 2 else y

    def forward(self, x: Any) -> Any:
        return self.chosen(self.conv(x))


class OnFunction(Pair):
    def chosen(self, y: Any) -> Any:
        function: Any = OnFunction.chosen
        function.calls = getattr(function, "calls", 0) + 1
        return self.norm(y) if function.calls % 2 else y

    def forward(self, x: Any) -> Any:
        return self.chosen(self.conv(x))


class OnChild(Pair):
    """Sets an attribute of a child behind the back of nn.Module."""

    def forward(self, x: Any) -> Any:
        calls = vars(self.norm).get("calls", 0) + 1
        object.__setattr__(self.norm, "calls", calls)
        y = self.conv(x)
        return self.norm(y) if calls % 2 else y


def start() -> None:
    """As if no call had been made yet."""
    for function in (InDefault.forward, InDefaultOfHelper.chosen):
        for default in function.__defaults__ or ():
            default.clear()
    vars(OnFunction.chosen).clear()


CALLS = (lambda model: model(images()),) * 4
HELD: dict[str, tuple[Callable[[], Any], Skips]] = {
    "count": (itertools.count, lambda held: next(held) % 2 == 1),
    "cycle": (lambda: itertools.cycle([0, 1]), lambda held: next(held) == 1),
    "iterator": (lambda: iter([0, 1] * 99), lambda held: next(held) == 1),
    "array": (lambda: np.zeros(1, dtype=int), counted),
    "bytes": (lambda: bytearray(1), counted),
    "slots": (Slots, counted_in_slots),
    "an object that is called": (Called, lambda held: held()),
    "deque": (lambda: deque(maxlen=2), grown),
    "generator of Python": (lambda: random.Random(0), lambda held: held.random() < 0.5),
    "generator of numpy": (lambda: np.random.default_rng(0), lambda held: held.random() < 0.5),
}
FORMS = {
    **{name: Form(holding(make, skips), calls=CALLS) for name, (make, skips) in HELD.items()},
    "a default": Form(InDefault, calls=CALLS, before=start),
    "a default of a helper": Form(InDefaultOfHelper, calls=CALLS, before=start),
    "a function": Form(OnFunction, calls=CALLS, before=start),
    "a child's attributes": Form(OnChild, calls=CALLS),
}

test_exact_or_refused = exact_or_refused(FORMS)
