"""The faults of `python -m benchmarks.verdict` are all caught, and of its right pairs none fails.

All faults are tried here, and the pairs of one seed in float64 and float32; the command tries more.
"""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.verdict.command import BEGIN, END, Tally, with_table
from benchmarks.verdict.faults import Fault, faults, passes
from benchmarks.verdict.nets import FAMILIES
from benchmarks.verdict.pairs import FORMS, Pair, judged, pairs

FAULTS = faults()


@cache
def right_net_passes(kind: str) -> bool:
    return passes(next(fault for fault in FAULTS if fault.kind == kind), is_spoilt=False)


@pytest.mark.parametrize("fault", FAULTS, ids=map(str, FAULTS))
def test_a_fault_is_caught_and_the_net_without_it_passes(fault: Fault) -> None:
    assert right_net_passes(fault.kind)
    assert not passes(fault)


QUICK = [
    pair
    for pair in pairs(1)
    if pair.precision in ("float64", "float32") and pair.family != "YOLO-like"
] + [Pair("YOLO-like", 1, "folded in its own precision", "float32")]


@pytest.mark.parametrize("pair", QUICK, ids=map(str, QUICK))
def test_a_right_pair_passes(pair: Pair) -> None:
    report = judged(pair)
    assert report, report


def test_there_are_as_many_as_the_page_says() -> None:
    assert len(FAULTS) >= 70
    assert len(list(pairs(6))) >= 400
    assert {pair.family for pair in pairs(1)} == set(FAMILIES)
    assert {pair.form for pair in pairs(1)} == set(FORMS)


def test_the_table_counts_what_went_wrong() -> None:
    missed = [Tally("map", 3, ("one pixel",)), Tally("scores", 2, ())]
    failed = [Tally("tiny, float32", 4, ("tiny 0: FAIL",)), Tally("tiny, bf16", 5, ())]
    facts = {"command": "python -m benchmarks.verdict", "torch": "2"}
    page = with_table(f"before\n{BEGIN}\nold\n{END}\nafter", missed, failed, facts)
    assert page.startswith(f"before\n{BEGIN}\n")
    assert page.endswith(f"{END}\nafter")
    assert "old" not in page
    assert "Faults: 5 tried, 4 caught. Right pairs: 9 tried, 1 failed." in page
    assert "| map | 3 | 2 |" in page
    assert "| tiny | 0 | 4 | 5 | 0 | 1 |" in page
