"""Puts back what a run of a model changed in it.

The state of a model is what hangs on it and on the objects that it holds: which modules stand
where, flags and counters, lists and dicts, the values of buffers; and what its code keeps in
defaults, classes and global variables. A forward may change any of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from orepa_compiler.capture.effects.remembering import Remembered
from orepa_compiler.generation.store import KernelStore


class Watching:
    """A hook that looks at a run; what it has seen is no state of the model that it hangs on."""

    __slots__ = ()


@contextmanager
def state_kept(model: nn.Module) -> Iterator[Remembered]:
    """The model is after it what it was before, as far as it is remembered."""
    before = state_of(model)
    try:
        yield before
    finally:
        before.put_back()


def state_of(model: nn.Module) -> Remembered:
    """What a model is made of, as it is now."""
    found = Remembered(model, left_out=(KernelStore, Watching))
    found.remember_code(model.modules())
    return found
