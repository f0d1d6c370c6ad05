"""What cannot be seen in an object's attributes: how far an iterator is, what an array holds."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_DEEPEST = 4


def position_of(value: Any) -> int | None:
    """A number that changes when an iterator, a generator of numbers or an array does.

    None for what is none of these, or does not tell.
    """
    if isinstance(value, bytearray):
        return hash(bytes(value))
    if is_iterator(value):
        return _place_of(value, 0)
    state: Any = None
    if isinstance(value, random.Random):
        state = value.getstate()
    elif isinstance(value, torch.Generator):
        state = value.get_state().numpy().tobytes()
    elif (numpy := sys.modules.get("numpy")) is not None:
        if isinstance(value, numpy.ndarray):
            state = value.shape, value.tobytes()
        elif isinstance(value, numpy.random.Generator):
            state = repr(value.bit_generator.state)
        elif isinstance(value, numpy.random.RandomState):
            state = repr(value.get_state(legacy=False))
    return None if state is None else hash(state)


def _place_of(iterator: Any, depth: int) -> int | None:
    """How far an iterator is, by what pickle would write of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some iterators will not be pickled in a later Python
        try:
            return _number_of(iterator.__reduce__(), depth + 1)
        except Exception:  # a generator, or one of a user's that is not pickled
            return None


def _number_of(written: Any, depth: int) -> int:
    if isinstance(written, _PLAIN):
        return hash(written)
    if depth < _DEEPEST and is_iterator(written):
        return _place_of(written, depth) or 0
    if depth < _DEEPEST and isinstance(written, (list, tuple)):
        return hash(tuple(_number_of(part, depth + 1) for part in written))
    return id(written)


def is_hidden(value: Any) -> bool:
    """Whether the state of an object of Python is not in its attributes."""
    return isinstance(value, random.Random)


def is_iterator(value: Any) -> bool:
    """Whether a value is gone through once, one step at each next()."""
    return hasattr(type(value), "__next__")


def puts_back(value: Any) -> Callable[[], None] | None:
    """What gives an object the state that it has now; None for an iterator, which only goes on."""
    if isinstance(value, bytearray):
        return partial(value.__setitem__, slice(None), bytes(value))
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, torch.Generator):
        return partial(_set_state, value, value.get_state())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.ndarray):
        return partial(numpy.copyto, value, value.copy()) if value.flags.writeable else None
    if isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    return None


def _set_state(generator: torch.Generator, state: torch.Tensor) -> None:
    generator.set_state(state)
