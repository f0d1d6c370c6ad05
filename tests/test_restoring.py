"""A model whose rewrite fails in the middle is what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.capture import Capture
from orepa_compiler.passes import (
    Adopt,
    Collapse,
    Cut,
    Expand,
    Linearize,
    Pass,
    Pipeline,
    Squeeze,
    Touched,
    Touching,
)
from orepa_compiler.passes.collapse import absorb_norm
from orepa_compiler.planning import Edit, Plan
from orepa_compiler.rewriting.restoring import restoring
from tests.norms import randomise_norms


class Failure(Exception):
    """What a pass raises here in the middle of its work."""


class Sum(nn.Module):
    """Branches with norms of their own, added."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.small = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.large(x) + self.small(x))


class Own(nn.Module):
    """A block that knows how to become one conv."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fuse(self) -> nn.Module:
        return orepa.collapse(nn.Sequential(self.conv, self.norm).eval())


def net() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
        nn.ConvTranspose2d(4, 4, 3),
        nn.BatchNorm2d(4),
        Sum(),
        Own(),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4),
    )
    return randomise_norms(model)


def state(model: nn.Module) -> dict[int, Any]:
    """All that a model is, by identity: modules, tensors and what is in them, hooks and modes."""
    found: dict[int, Any] = {}
    for module in model.modules():
        held = {
            name: list(value.items()) if isinstance(value, dict) else value
            for name, value in vars(module).items()
        }
        found[id(module)] = (type(module), list(held), [*map(_identity, held.values())])
    for tensor in (*model.parameters(), *model.buffers()):
        found[id(tensor)] = (tensor.detach().clone(), tensor.requires_grad)
    return found


def _identity(value: Any) -> Any:
    if isinstance(value, list):
        return [_identity(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(_identity(inner) for inner in value)
    return value if isinstance(value, (bool, str, int)) else id(value)


def assert_is(model: nn.Module, before: dict[int, Any]) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for key, (first, *rest) in before.items():
        found, *others = after[key]
        assert torch.equal(found, first) if isinstance(first, Tensor) else found is first
        assert others == rest


@dataclass(frozen=True)
class FailsBehind:
    """A pass that does all that another does, or a part of its edits, and then fails."""

    step: Pass
    edits: int
    name: str = "fails"

    @property
    def training(self) -> bool | None:
        return self.step.training

    @property
    def preserves(self) -> frozenset[str]:
        return self.step.preserves

    def plan(self, capture: Capture) -> Plan:
        return self.step.plan(capture)

    def touched(self, edit: Edit) -> Touched:
        return self.step.touched(edit) if isinstance(self.step, Touching) else Touched((edit.path,))

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        is_trial = next(model.parameters()).is_meta
        if is_trial:  # on a copy without values
            return self.step.apply(model, capture, plan)
        self.step.apply(model, capture, Plan(plan.edits[: self.edits]))
        raise Failure


def expanded(**options: Any) -> nn.Module:
    return randomise_norms(orepa.expand(net(), where=["0", "6"], **options))


LINEAR = replace(orepa.ACNET, scaling_layer="vector")
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[Pass, ...]]] = {
    "linearize": (net, (Linearize(),)),
    "linearize blocks": (lambda: expanded(block=orepa.REPVGG), (Linearize(),)),
    "expand": (net, (Expand(where="**"),)),
    "expand and squeeze": (net, (Expand(where="**"), Squeeze())),
    "more branches": (
        lambda: expanded(block=LINEAR),
        (Expand(block=orepa.OREPA, where=["0", "6"]),),
    ),
    "collapse": (net, (Collapse(),)),
    "collapse blocks": (expanded, (Collapse(),)),
    "collapse and give the bias away": (
        lambda: expanded(block=orepa.REPVGG),
        (Collapse(fold_norm=False),),
    ),
    "cut": (lambda: expanded(block=orepa.OREPA), (Cut(),)),
    "cut branches": (lambda: expanded(block=orepa.OREPA), (Cut(branches=("average",)),)),
    "adopt": (net, (Adopt(paths=("5",)),)),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("build", "steps"), KINDS.values(), ids=KINDS)
def test_a_pass_that_fails_in_the_middle_leaves_the_model_as_it_was(
    build: Callable[[], nn.Module], steps: tuple[Pass, ...], training: bool
) -> None:
    model = build().train(training)
    model[4].register_forward_hook(lambda module, args, output: None)
    before = state(model)
    planned = _planned(copy.deepcopy(model), steps)
    assert planned
    for edits in range(1, planned + 1):
        *first, last = steps
        with pytest.raises(Failure), torch.no_grad():
            Pipeline((*first, FailsBehind(last, edits))).run(model)
        assert_is(model, before)


def _planned(model: nn.Module, steps: tuple[Pass, ...]) -> int:
    with torch.no_grad():
        _, done = Pipeline(steps).run(model)
    return len(done.of(steps[-1].name).edits)


def test_it_is_the_restoring_that_puts_back() -> None:
    model = net()
    before = state(model)
    with pytest.raises(Failure), torch.no_grad():
        Pipeline((FailsBehind(Collapse(), 9),)).run(model, restores=False)
    assert state(model).keys() != before.keys()


def test_a_collapse_in_place_that_fails_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module, fold: Any) -> nn.Module:
        if next(model.parameters()).is_meta:
            return absorb_norm(model, fold)
        raise Failure

    monkeypatch.setattr("orepa_compiler.passes.collapse.absorb_norm", fails)
    model = net().train()
    del model[5]  # what has a method of its own is tried before
    before = state(model)
    with pytest.raises(Failure):
        orepa.collapse(model, inplace=True)
    assert_is(model, before)


def fail_after(model: nn.Module, change: Callable[[], None]) -> None:
    def failing() -> None:
        with restoring(model):
            change()
            raise Failure

    with pytest.raises(Failure):
        failing()


def test_what_stands_on_a_module_is_put_back() -> None:
    model = net()
    model[0].notes, model[0].calls = {"seen": [1, {2}], "pair": ([3], 4)}, 3
    model[6].register_forward_hook(lambda module, args, output: None)
    before, notes = state(model), copy.deepcopy(model[0].notes)

    def changed() -> None:
        model[0].notes["seen"][1].add(7)
        model[0].notes["seen"].append(4)
        model[0].notes["pair"][0].append(6)
        model[0].notes["more"] = 5
        del model[0].calls
        model[0].__class__ = nn.Conv3d
        model[4] = nn.Identity()
        model[6]._forward_hooks.clear()
        model[6].weight.requires_grad_(False)
        model[7].running_mean = torch.zeros(4)
        model.add_module("new", nn.ReLU())
        model.train(not model.training)

    fail_after(model, changed)
    assert_is(model, before)
    assert model[0].notes == notes


def test_the_order_of_children_is_put_back() -> None:
    model = net()
    names = list(model._modules)
    fail_after(model, lambda: model._modules.update({"0": model._modules.pop("0")}))
    assert list(model._modules) == names


def test_without_an_error_nothing_is_put_back() -> None:
    model = net()
    with restoring(model):
        model[0] = nn.Identity()
    assert isinstance(model[0], nn.Identity)
