"""Forwards that do more than compute: what a graph of them would lose stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import autocast

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.capture import capture
from orepa_compiler.capture.effects.finding import effects_of
from orepa_compiler.passes import is_leaf
from tests.norms import randomise_norms


class Branches(nn.Module):
    """Two branches with norms behind a stem. run: how the stem is run."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.point_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.register_buffer("factor", torch.ones(()))
        self.run, self.runs, self.kept = run, 0, [0]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.run(self, x))
        return self.norm(self.conv(x)) + self.point_norm(self.point(x))


def frozen(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.stem(x)


def precise(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.stem(x)


def counting(m: Any, x: Tensor) -> Tensor:
    m.runs += 1
    return m.stem(x)


def keeping(m: Any, x: Tensor) -> Tensor:
    m.kept.append(1)
    return m.stem(x)


def decaying(m: Any, x: Tensor) -> Tensor:
    m.factor.mul_(0.9)
    return m.stem(x) * m.factor


def plain(m: Any, x: Tensor) -> Tensor:
    return m.stem(x) * m.factor


EFFECTS = {
    frozen: "switches gradients off",
    precise: "switches autocast",
    counting: "changes its runs",
    keeping: "changes its kept",
    decaying: "changes its factor",
    plain: None,
}


@pytest.mark.parametrize(("run", "effect"), EFFECTS.items(), ids=[f.__name__ for f in EFFECTS])
def test_a_graph_tells_what_it_does_not_hold(
    run: Callable[[Any, Tensor], Tensor], effect: str | None
) -> None:
    net = Branches(run)
    with torch.set_grad_enabled(run is not counting):  # whatever the caller switched
        captured = capture(net, training=True, is_leaf=is_leaf)
    assert effects_of(captured.graphs[""]) == effect


@pytest.mark.parametrize(("run", "effect"), EFFECTS.items(), ids=[f.__name__ for f in EFFECTS])
def test_such_a_forward_is_not_written_anew_and_its_layers_are_still_folded(
    run: Callable[[Any, Tensor], Tensor], effect: str | None
) -> None:
    net = randomise_norms(Branches(run)).double().eval()
    deploy, x = orepa.collapse(net), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    if run is keeping:  # its next call may look at the list, and go another way
        (plan,) = orepa.recorded_plans(deploy)
        assert {r.reason for r in plan.refusals} == {
            "the forward of the model may go another way: it changes its kept"
        }
    else:
        assert not any(map(is_batch_norm, deploy.modules()))
    convs = sum(isinstance(module, nn.Conv2d) for module in deploy.modules())
    assert convs == (2 if effect is None else 3)
    for _ in range(3):
        torch.testing.assert_close(deploy(x), net(x), rtol=0, atol=1e-12)
    assert (deploy.runs, len(deploy.kept)) == (net.runs, len(net.kept))


def test_linearize_leaves_a_stem_without_gradients_without_them() -> None:
    net = Branches(frozen)
    expanded = orepa.expand(net, block=orepa.OREPA)
    reasons = {r.path: r.reason for r in orepa.recorded_plans(expanded)[-1].refusals}
    assert reasons[""] == (
        "the forward of the model switches gradients off, and one written anew would not"
    )
    expanded.train()(torch.randn(2, 3, 6, 6)).sum().backward()
    trained = {name for name, p in expanded.named_parameters() if p.grad is not None}
    assert "norm.weight" in trained
    assert not any(name.startswith("stem") for name in trained)


@pytest.mark.parametrize("run", [plain, decaying])
def test_inference_mode_changes_nothing_of_it(run: Callable[[Any, Tensor], Tensor]) -> None:
    net = randomise_norms(Branches(run)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.inference_mode():
        deploy = orepa.collapse(net)
        assert not any(map(is_batch_norm, deploy.modules()))
        for _ in range(3):
            torch.testing.assert_close(deploy(x), net(x), rtol=0, atol=1e-12)


def test_a_trace_leaves_autocast_as_it_was() -> None:
    def fails(m: Any, x: Tensor) -> Tensor:
        return m.stem(x) if x.sum() > 0 else x

    before = autocast.__enter__
    capture(nn.Sequential(Branches(fails), Branches(precise)), training=True, is_leaf=is_leaf)
    assert autocast.__enter__ is before


def test_a_weight_that_the_forward_reads_elsewhere_keeps_the_norm_outside() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(x * self.conv.weight.mean()))

    net = randomise_norms(nn.Sequential(Reads(), nn.BatchNorm2d(4))).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(orepa.collapse(net)(x), net(x), rtol=0, atol=1e-12)


def test_a_function_with_an_attribute_that_stays_is_no_effect() -> None:
    """As torch.jit.unused leaves one on the methods that it decorates (torchvision's DenseNet)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)

        @torch.jit.unused
        def checkpointed(self, x: Tensor) -> Tensor:
            return x

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(self.checkpointed(x)))

    deploy = orepa.collapse(Net().eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deploy.modules())
