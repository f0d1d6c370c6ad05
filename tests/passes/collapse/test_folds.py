"""The kinds of edits that collapse makes, as types and as plain data."""

from __future__ import annotations

from typing import Any

import pytest

from orepa_compiler import ReparamError
from orepa_compiler.passes.collapse.folds import (
    AbsorbNorm,
    Fold,
    FoldBlock,
    FoldConcatenation,
    FoldGraph,
    FoldPath,
    fold_of,
    fold_options,
)
from orepa_compiler.planning import Edit, Plan

# As plans that were saved have them: what they say must be read for as long as they are about.
SAVED: dict[str, tuple[dict[str, Any], Fold, tuple[str, ...]]] = {
    "path": (
        {
            "kind": "path",
            "owner": "body",
            "nodes": ["conv", "norm"],
            "source": "x",
            "modules": ["first", "body.conv", "body.norm", "last.0"],
            "before": "first",
            "behind": "last.0",
            "at": "body.conv",
            "rest": "body.norm",
        },
        FoldPath(
            "body",
            ("conv", "norm"),
            "x",
            ("first", "body.conv", "body.norm", "last.0"),
            "first",
            "last.0",
            "body.conv",
            "body.norm",
        ),
        ("first", "body.conv", "body.norm", "last.0"),
    ),
    "graph": (
        {
            "kind": "graph",
            "owner": "",
            "nodes": ["a", "b", "add"],
            "source": "x",
            "modules": ["a", "b"],
            "before": None,
            "behind": None,
        },
        FoldGraph("", ("a", "b", "add"), "x", ("a", "b"), None, None),
        ("",),
    ),
    "block": ({"kind": "block", "owner": None, "modules": ["a"]}, FoldBlock("a"), ("a",)),
    "block and norm": (
        {"kind": "block", "owner": None, "modules": ["a"], "bias_to": "norm"},
        FoldBlock("a", "norm"),
        ("a", "norm"),
    ),
    "absorb": (
        {"kind": "absorb", "owner": None, "modules": ["a", "norm"]},
        AbsorbNorm("a", "norm"),
        ("a", "norm"),
    ),
    "concatenation": (
        {"kind": "concatenation", "owner": None, "modules": ["a", "b", "norm"], "within": "body"},
        FoldConcatenation(("a", "b"), "norm", "body"),
        ("body",),
    ),
}


def edit(options: dict[str, Any]) -> Edit:
    return Edit("collapse", "where", "before", "after", (1, 1), options=options)


@pytest.mark.parametrize(("saved", "fold", "places"), SAVED.values(), ids=SAVED)
def test_a_saved_edit_is_read_as_its_type_and_written_alike(
    saved: dict[str, Any], fold: Fold, places: tuple[str, ...]
) -> None:
    assert fold_of(edit(saved)) == fold
    assert fold_options(fold) == saved
    plan = Plan((edit(saved),))
    assert Plan.from_json(plan.to_json()) == plan
    assert fold.places == places


def test_the_modules_of_a_fold_are_all_that_change() -> None:
    assert FoldBlock("a", "norm").modules == ("a", "norm")
    assert FoldConcatenation(("a", "b"), "norm", "").modules == ("a", "b", "norm")
    path = SAVED["path"][1]
    assert isinstance(path, FoldPath)
    assert path.layers == ["body.conv", "body.norm"]


def test_a_plan_from_before_norms_elsewhere_were_folded_is_read() -> None:
    saved = {name: value for name, value in SAVED["graph"][0].items() if name not in ("before",)}
    assert fold_of(edit(saved)) == SAVED["graph"][1]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "its edit by collapse has no option 'kind'"),
    "no modules": ({"kind": "block"}, "its edit by collapse has no option 'modules'"),
    "an unknown kind": (
        {"kind": "melt", "modules": ["a"]},
        "collapse knows no edit of kind 'melt' for 1 modules",
    ),
    "a block of two": (
        {"kind": "block", "modules": ["a", "b"]},
        "collapse knows no edit of kind 'block' for 2 modules",
    ),
    "modules in one text": (
        {"kind": "block", "modules": "a"},
        "modules of its edit are 'a', not a list of names",
    ),
    "no place for the conv": (
        {name: value for name, value in SAVED["path"][0].items() if name != "at"},
        "its edit by collapse has no option 'at'",
    ),
}


@pytest.mark.parametrize(("options", "text"), WRONG.values(), ids=WRONG)
def test_an_edit_that_was_spoilt_by_hand_says_so(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ReparamError) as error:
        fold_of(edit(options))
    assert str(error.value) == f"where: the plan does not fit: {text}"
