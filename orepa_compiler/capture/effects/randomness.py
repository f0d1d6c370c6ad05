"""The generators of random numbers, of Python, numpy and torch: remembered, compared, put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The generators as they were when this was made; numpy's where it is imported."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._python = random.getstate()
        self._numpy = None if numpy is None else numpy.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def has_moved(self) -> bool:
        """Whether a number was drawn meanwhile, on the CPU."""
        now = RandomState()
        by_numpy = False
        if self._numpy is not None and now._numpy is not None:
            (_, keys, position, *_), (_, new_keys, new_position, *_) = self._numpy, now._numpy
            by_numpy = position != new_position or bool((keys != new_keys).any())
        return self._python != now._python or by_numpy or not torch.equal(self._torch, now._torch)

    def put_back(self) -> None:
        """Gives the generators the states that they had."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """The generators are after it what they were before."""
    before = RandomState()
    try:
        yield
    finally:
        before.put_back()


def seed_all(seed: int) -> None:
    """The generators begin anew, all at the same number."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)
    torch.manual_seed(seed)
