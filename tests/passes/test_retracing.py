"""A rewrite is tried on a copy and traced again; what is not the same keeps its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from tests.norms import randomise_norms


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, **options: Any) -> Any:
        return F.relu(self.norm(self.conv(x)))


class Flag(Pair):
    def forward(self, x: Tensor, features: bool = False) -> Any:  # type: ignore[override]
        y = self.conv(x)
        return y if features else self.norm(y)


class Extra(Pair):
    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:  # type: ignore[override]
        y = self.conv(x)
        return self.norm(y) if extra is None else self.norm(y + extra)


class Named(Pair):
    def forward(self, x: Tensor, until: str = "end") -> Any:  # type: ignore[override]
        y = self.conv(x)
        return y if until == "conv" else self.norm(y)


class Keywords(Pair):
    def forward(self, x: Tensor, **options: Any) -> Any:
        y = self.conv(x)
        return y if options.get("features", False) else self.norm(y)


class Both(Pair):
    """Either flag alone changes nothing of the norm."""

    def forward(self, x: Tensor, one: bool = False, two: bool = False) -> Any:  # type: ignore[override]
        y = self.conv(x)
        return y if one and two else self.norm(y)


class Unconcerned(Pair):
    def forward(self, x: Tensor, activate: bool = True) -> Any:  # type: ignore[override]
        y = self.norm(self.conv(x))
        return F.relu(y) if activate else y


class Gradients(Pair):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        y = self.conv(x)
        return self.norm(y) if torch.is_grad_enabled() else y


class LooksAtTheNorm(Pair):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        y = self.norm(self.conv(x))
        return F.relu(y) if isinstance(self.norm, nn.BatchNorm2d) else y


class LooksForABias(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        y = self.norm(self.conv(x))
        return y if self.conv.bias is None else F.relu(y)


class Closure(Pair):
    def __init__(self) -> None:
        super().__init__()
        conv = self.conv
        self.run = lambda x: conv(x)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.norm(self.run(x))


REFUSED: dict[type[Pair], tuple[list[dict[str, Any]], str]] = {
    Flag: ([{}, {"features": True}], "with features=True the forward goes another way"),
    Extra: ([{}, {"extra": torch.ones(1)}], "with extra= something the forward goes another way"),
    Named: (
        [{}, {"until": "conv"}],
        "it cannot be told what it does with another until than 'end'",
    ),
    Keywords: ([{}, {"features": True}], "with features=True the forward goes another way"),
    Both: ([{}, {"one": True, "two": True}], "with one=True and two=True the forward goes another"),
    Gradients: ([{}], "it asks whether gradients, inference mode or autocast are on"),
    LooksAtTheNorm: ([{}], "the forward of the model goes another way with it rewritten"),
    LooksForABias: ([{}], "the forward of the model goes another way with it rewritten"),
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("given", [False, True], ids=["", "inputs"])
def test_a_norm_stays_where_another_call_goes_another_way(make: type[Pair], given: bool) -> None:
    calls, why = REFUSED[make]
    net, x = randomise_norms(make()).double().eval(), torch.randn(2, 3, 6, 6).double()
    deploy = orepa.collapse(net, inputs=x if given else None)
    reasons = [r.reason for plan in orepa.recorded_plans(deploy) for r in plan.refusals]
    assert any(why in reason for reason in reasons), reasons
    for call in calls:
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                torch.testing.assert_close(deploy(x, **call), net(x, **call), rtol=0, atol=1e-12)


def test_a_flag_that_does_not_concern_the_norm_keeps_nothing() -> None:
    net, x = randomise_norms(Unconcerned()).double().eval(), torch.randn(2, 3, 6, 6).double()
    deploy = orepa.collapse(net)
    assert not any(map(is_batch_norm, deploy.modules()))
    for activate in (True, False):
        torch.testing.assert_close(deploy(x, activate), net(x, activate), rtol=0, atol=1e-12)


def test_a_conv_that_is_run_out_of_a_closure_is_not_expanded() -> None:
    net = Closure()
    plan = orepa.plan(net)
    assert not plan.edits
    (refusal,) = plan.refusals
    assert "is not installed as a submodule" in refusal.reason


def test_convs_that_are_run_from_lists_and_dicts_are_expanded_and_train() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Pair(), nn.Conv2d(8, 8, 3, padding=1)
            self.norm, self.levels = nn.BatchNorm2d(8), {"p3": [self.second]}

        def forward(self, x: Tensor) -> Any:
            return self.norm(self.levels["p3"][0](self.first(x)))

    net, x = randomise_norms(Pyramid()).double(), torch.randn(2, 3, 6, 6).double()
    expanded = orepa.expand(net)
    assert expanded.levels["p3"][0] is expanded.second  # type: ignore[index, union-attr]
    expanded(x).sum().backward()
    assert all(p.grad is not None for p in expanded.parameters())
    deploy = orepa.collapse(expanded)
    torch.testing.assert_close(deploy(x), expanded.eval()(x), rtol=0, atol=1e-10)
    assert not any(map(is_batch_norm, deploy.modules()))
