"""Masks and class ids: exact where the reference decides clearly, by the decision where not."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler.verification import verify_callables
from orepa_compiler.verification.outputs.decisions import Deciding
from tests.verification_nets import Returning, X, only_row, reasons


class Threshold(nn.Module):
    """A mask, and more of what is decided, on values that are given."""

    def __init__(self, decide: Callable[[Tensor], Any], off: float = 0.0) -> None:
        super().__init__()
        self.scale, self.decide = nn.Parameter(torch.ones(1)), decide
        self.off = off

    def forward(self, x: Tensor) -> Any:
        return self.decide(x * self.scale + self.off)


NEAR = torch.tensor([[-1.0, -0.5, 1e-9, 0.5, 1.0, 0.5]])  # third: by less than rounding; 0.5 twice

DECIDED: dict[str, Callable[[Tensor], Any]] = {
    "mask": lambda v: v > 0,
    "not less": lambda v: ~(v <= 0),
    "as numbers": lambda v: (v > 0).float(),
    "as bytes": lambda v: (v > 0).to(torch.uint8).reshape(2, 3),
    "between": lambda v: (v > 0) & (v < 0.9),
    "some": lambda v: (v > 0).any(),
    "how many": lambda v: (v > 0.5).sum(),
    "python": lambda v: bool((v > 0.5)[0, 3]),
}


@pytest.mark.parametrize("decide", DECIDED.values(), ids=DECIDED.keys())
def test_a_mask_is_compared_and_may_turn_where_it_is_not_decided(
    decide: Callable[[Tensor], Any],
) -> None:
    model = Threshold(decide)
    assert verify_callables(model, deepcopy(model), NEAR)
    # 1e-9 of 1.0 is below the rounding of float32: either is right.
    assert verify_callables(model, Threshold(decide, off=-2e-9), NEAR)


@pytest.mark.parametrize(
    ("name", "wrong"), [("mask", 2), ("as numbers", 2), ("as bytes", 2), ("between", 3)]
)
def test_a_mask_that_is_wrong_where_it_is_decided_fails(name: str, wrong: int) -> None:
    row = only_row(
        verify_callables(Threshold(DECIDED[name]), Threshold(DECIDED[name], off=-0.6), NEAR)
    )
    assert f"{wrong} of 6 values differ where the reference decides clearly; at (" in row.reason
    assert "of what it is decided on, above 4.8e-07" in row.reason
    assert row.error == pytest.approx((wrong + 1) / 6)  # the undecided one differs, and may


CHOSEN: dict[str, Callable[[Tensor], Any]] = {
    "first": lambda v: v.argmax(1),
    "kept axis": lambda v: v.argmax(1, keepdim=True),
    "of all": lambda v: v.argmax(),
    "by max": lambda v: v.max(1)[1].to(torch.int32),
    "three best": lambda v: v.topk(3, dim=1)[1],
    "sorted": lambda v: v.argsort(1, descending=True),
    "turned": lambda v: v.reshape(1, 2, 3).argmax(2).t(),
}


@pytest.mark.parametrize("choose", CHOSEN.values(), ids=CHOSEN.keys())
def test_an_index_may_be_any_of_equals_and_no_other(choose: Callable[[Tensor], Any]) -> None:
    scores = torch.tensor([[0.2, 0.9, 0.9, -1.0, 0.9, 0.1]])
    tie = torch.tensor([[0.0, 0.0, 1e-8, 0.0, 2e-8, 0.0]])
    model = Threshold(choose)
    assert verify_callables(model, Threshold(lambda v: choose(v + tie)), scores)
    wrong = Threshold(lambda v: choose(-v))
    assert "decides clearly" in reasons(verify_callables(model, wrong, scores))
    none = Threshold(lambda v: choose(v) + 1000)
    assert "by inf of what it is decided on" in reasons(verify_callables(model, none, scores))


def test_what_is_decided_by_no_comparison_is_asked_by_moving_the_weights() -> None:
    model = Threshold(lambda v: (v * 4).round().to(torch.int64))
    values = torch.tensor([[0.125, 0.3, 0.375 + 1e-9]])  # two halves, that rounding may turn
    assert verify_callables(
        model, Threshold(lambda v: (v * 4 + 1e-6).round().to(torch.int64)), values
    )
    wrong = Threshold(lambda v: (v * 4 + 0.5).round().to(torch.int64))
    assert "1 of 3 values differ" in reasons(verify_callables(model, wrong, values))


def test_a_reference_that_is_no_module_is_compared_exactly() -> None:
    assert verify_callables(lambda x: x > 0, lambda x: x > 0, X)
    off = verify_callables(lambda x: x > 0, lambda x: x > 1e-9, torch.tensor([1e-10, 1.0]))
    assert "1 of 2 values differ where the reference decides clearly" in reasons(off)


def test_python_values_and_large_integers_are_exact() -> None:
    model = Returning(lambda f, s: {"flag": True, "big": torch.tensor(2**60)})
    assert verify_callables(model, deepcopy(model), X)
    other = Returning(lambda f, s: {"flag": False, "big": torch.tensor(2**60 + 1)})
    assert reasons(verify_callables(model, other, X)).count("1 of 1 values differ") == 2


def test_half_precision_has_a_wider_border() -> None:
    model = Threshold(lambda v: {"mask": v > 0, "sum": v})
    values = torch.tensor([[0.001, 1.0]])
    off = Threshold(lambda v: {"mask": v > 0.002, "sum": v})
    assert verify_callables(model, off.bfloat16(), values, precision="bf16")
    assert not verify_callables(model, off, values)


def test_a_decision_is_known_by_the_very_tensor() -> None:
    with Deciding() as deciding:
        mask = X > 0
        other = torch.zeros(4, dtype=torch.bool)
    assert list(deciding.of({"mask": mask, "other": other, "copy": mask.clone()})) == ["mask"]
