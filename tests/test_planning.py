"""The plan as a value: what it prints, what it saves, and what it refuses to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import fx, nn

import orepa_compiler as orepa
from orepa_compiler.errors import CheckpointError
from orepa_compiler.planning import (
    Edit,
    Plan,
    Refusal,
    record_plan,
    recorded_plans,
    short_number,
)
from tests.compiler_nets import branch_net

GOLDEN = Path(__file__).parent / "golden" / "plan_resnet.txt"

EDIT = Edit("expand", "a.b", "before", "after", (10, 2000), (5, 7), "note", {"list": [1, "x"]})
BARE = Edit("squeeze", "a", "before", "after", (1, 1))
REFUSAL = Refusal("expand", "c", "Conv2d", "no reason")


def printed(plan: Plan) -> str:
    """The plan as text; rich pads each line with spaces, which a diff need not show."""
    return "\n".join(line.rstrip() for line in str(plan).splitlines()) + "\n"


def test_the_printed_plan_of_a_resnet() -> None:
    plan = orepa.plan(timm.create_model("test_resnet"), inputs=torch.zeros(1, 3, 64, 64))
    assert printed(plan) == GOLDEN.read_text()


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan((EDIT, BARE), (REFUSAL,)),
        orepa.plan(branch_net(), block=orepa.OREPA),
    ],
    ids=["empty", "by hand", "real"],
)
def test_json_gives_the_plan_back(plan: Plan) -> None:
    restored = Plan.from_json(plan.to_json())
    assert restored == plan
    assert printed(restored) == printed(plan)
    assert json.loads(plan.to_json())["format"] == 1


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(Plan((EDIT,), (REFUSAL,)).to_json()), **changes})


BAD = {
    "not JSON": "{",
    "empty": "",
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "no format": "{}",
    "edits a number": changed(edits=3),
    "edits null": changed(edits=None),
    "edits of text": changed(edits=["x"]),
    "an edit without a path": changed(edits=[{"done_by": "expand"}]),
    "parameters a number": changed(
        edits=[{**json.loads(Plan((EDIT,)).to_json())["edits"][0], "parameters": 3}]
    ),
    "an unknown field": changed(refusals=[{"done_by": "expand", "colour": "red"}]),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_is_not_a_plan(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"^this is not a plan: "):
        Plan.from_json(text)


def test_a_plan_of_another_version() -> None:
    with pytest.raises(CheckpointError) as caught:
        Plan.from_json(changed(format=2))
    assert str(caught.value) == (
        "the plan has format 2, this version reads 1; "
        "use the version of orepa-compiler that wrote it"
    )


def test_plans_add_and_part() -> None:
    whole = Plan((EDIT,)) + Plan((BARE,), (REFUSAL,))
    assert whole == Plan((EDIT, BARE), (REFUSAL,))
    assert whole.of("expand") == Plan((EDIT,), (REFUSAL,))
    assert whole.of("squeeze") == Plan((BARE,))
    assert whole.of("collapse") == Plan()


def test_the_summary_counts() -> None:
    empty = "Nothing to do: no conv, no norm behind a conv, no block."
    assert Plan().summary() == empty
    assert printed(Plan()) == empty + "\n"
    assert Plan((EDIT, BARE), (REFUSAL,)).summary() == (
        "Plan: expand 1, squeeze 1, left alone 1; their parameters 10 -> 2,000"
    )


def test_the_table_shows_what_a_reader_asks_for() -> None:
    many = tuple(Refusal("expand", f"head{i}", "Conv2d", "no reason") for i in range(6))
    text = printed(Plan((EDIT, BARE, Edit("collapse", "", "x", "y", (1, 1))), many))
    for word in ("a.b", "10 -> 2 k", "note", "(root)", "no reason"):
        assert word in text
    assert "6  no reason  head0, head1, head2, head3 and 2 more" in text
    assert "squeeze  a" not in text  # it changes no parameter


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (9408, "9.41 k"), (25_557_032, "25.6 M")],
)
def test_short_numbers(value: int, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize("is_graph", [False, True])
def test_plans_are_recorded_in_order(is_graph: bool) -> None:
    model: nn.Module = nn.Sequential(nn.ReLU())
    model = fx.symbolic_trace(model) if is_graph else model
    first, second = Plan((EDIT,)), Plan((BARE,))
    assert recorded_plans(model) == ()
    record_plan(model, first)
    record_plan(model, second)
    assert recorded_plans(model) == (first, second)
    assert model.state_dict() == {}
