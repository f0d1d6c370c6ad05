"""Modules that plain containers hold are replaced there too."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from torch import nn

from orepa_compiler.rewriting.holding import hold_new, holdings_of

Parts = namedtuple("Parts", "conv other")


def test_lists_dicts_tuples_and_attributes_get_the_new_module() -> None:
    model: Any = nn.Module()
    model.conv = old = nn.Conv2d(1, 1, 1)
    model.nested = [{"p3": [old, 1]}, (None, (old,))]
    model.parts = Parts(old, "other")
    object.__setattr__(model, "alias", old)
    holdings = holdings_of(model)
    assert {held.keys for held in holdings} == {(0, "p3", 0), (1, 1, 0), (0,), ()}
    model.conv = new = nn.Conv2d(1, 1, 1)
    hold_new(model, holdings)
    assert model.nested == [{"p3": [new, 1]}, (None, (new,))]
    assert model.parts == Parts(new, "other")
    assert vars(model)["alias"] is new


def test_what_is_gone_or_a_stranger_stays_where_it_is() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 1, 1))
    stranger = nn.Conv2d(1, 1, 1)
    model.held = [model[0], stranger]
    holdings = holdings_of(model)
    assert [held.path for held in holdings] == ["0"]
    old = model[0]
    del model[0]
    hold_new(model, holdings)
    assert model.held == [old, stranger]
