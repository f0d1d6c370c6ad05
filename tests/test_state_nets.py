"""Nets of random stages with state come out of every verb exact, or are refused.

OREPA_STATE_NETS=3000 tries as many nets; one that fails is named by its seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

import orepa_compiler as orepa
from tests.hostile.forms import Form
from tests.hostile.judging import faults, stock_of
from tests.state_nets import StateNet, calls, images

NETS = int(os.environ.get("OREPA_STATE_NETS", "60"))

pytestmark = pytest.mark.filterwarnings("ignore::orepa_compiler.NothingExpandedWarning")


def form(seed: int) -> Form:
    return Form(lambda: StateNet(seed), inputs=images(), calls=calls())


def ways(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """One of collapse, expand and expand with linearize, with inputs or without."""
    told = {"inputs": images()} if seed % 6 < 3 else {}
    yield (
        ("collapse", told),
        ("expand", told),
        ("expand", {**told, "block": orepa.OREPA}),
    )[seed % 3]


@pytest.mark.parametrize("seed", range(NETS))
def test_exact_or_refused(seed: int) -> None:
    found = faults(form(seed), ways=ways(seed))
    assert not found, "\n".join([", ".join(StateNet(seed).kinds()), *found])


def test_what_has_no_state_is_folded_beside_it() -> None:
    """The nets would all pass if nothing was ever folded."""
    left = total = 0
    for seed in range(20):
        net = stock_of(form(seed))
        total += norms(net)
        left += norms(orepa.collapse(net))
    assert left < 0.8 * total, f"{left} of {total} norms are left"


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
