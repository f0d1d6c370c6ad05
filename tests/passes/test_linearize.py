"""Linearize: branch norms become scaling layers, with one norm behind the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.blocks import LINEARIZED, LinearBlock
from orepa_compiler.capture import capture
from orepa_compiler.passes import Linearize, Pipeline, Squeeze, is_leaf
from orepa_compiler.planning import Plan
from tests.compiler_nets import (
    Branches,
    assert_same,
    batch,
    branch_net,
    conv_norm,
    fingerprint,
    output,
    train_a_step,
    untouched,
)
from tests.norms import randomise_norms


def linearize(model: nn.Module, **options: Any) -> tuple[nn.Module, Plan]:
    return Pipeline((Linearize(**options),)).run(model)


def linearize_plan(model: nn.Module) -> Plan:
    return Linearize().plan(capture(model, training=True, is_leaf=is_leaf))


class Overparameterized(nn.Module):
    """MobileOne's sum: several conv-norm branches, a 1x1 one, a norm, added in a loop."""

    def __init__(self, *, groups: int = 1) -> None:
        super().__init__()
        options = {"groups": groups}
        self.large = nn.ModuleList(conv_norm(6, 6, 3, padding=1, **options) for _ in range(3))
        self.scale, self.skip = conv_norm(6, 6, 1, **options), nn.BatchNorm2d(6)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = 0
        for branch in self.large:
            y = y + branch(x)
        return self.act(self.skip(x) + self.scale(x) + y)


class Biased(nn.Module):
    """Branches with conv biases, one without a norm, and the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = conv_norm(6, 6, 3, padding=1, bias=True), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.large(x) + self.small(x))


class NormBehind(nn.Module):
    """A sum that the net's own norm follows."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = conv_norm(6, 6, 3, padding=1), conv_norm(6, 6, 1, bias=True)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.large(x) + self.small(x)))


def wide(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 6, 9, 9, generator=generator, dtype=torch.float64)


SUMS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "RepVGG": (lambda: Branches(6, 6), ["origin", "pointwise", "identity"]),
    "RepVGG with a stride": (lambda: Branches(6, 8, stride=2), ["origin", "pointwise"]),
    "MobileOne": (
        Overparameterized,
        ["identity", "pointwise", "origin", "origin_2", "origin_3"],
    ),
    "MobileOne, depthwise": (
        lambda: Overparameterized(groups=6),
        ["identity", "pointwise", "origin", "origin_2", "origin_3"],
    ),
    "biases and the input": (Biased, ["identity", "origin", "pointwise"]),
    "own norm behind": (NormBehind, ["origin", "pointwise"]),
}


@pytest.mark.parametrize(("build", "names"), SUMS.values(), ids=SUMS)
def test_the_outputs_in_eval_mode_stay_the_same(
    build: Callable[[], nn.Module], names: list[str]
) -> None:
    net, x = randomise_norms(build().double()), wide()
    expected = output(net, x)
    model, made = linearize(net)
    assert len(made.edits) == 1
    block = next(module for module in model.modules() if isinstance(module, LinearBlock))
    assert list(block.branches) == names
    assert block.block_name == LINEARIZED
    assert_same(output(model, x), expected, 1e-12)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1
    assert (block.norm is None) == (build is NormBehind)
    squeezed, _ = Pipeline((Squeeze(),)).run(model)
    assert_same(output(squeezed, x), expected, 1e-12)
    assert_same(output(orepa.collapse(squeezed), x), expected, 1e-12)


def test_the_scaling_rows_are_what_the_norms_multiplied_by() -> None:
    net = randomise_norms(Branches(6, 6).double())
    kernels = [net.get_parameter(f"{n}.conv.weight").detach().clone() for n in ("large", "small")]
    norms = [net.get_submodule(name) for name in ("large.norm", "small.norm", "same")]
    factors = [n.weight / (n.running_var + n.eps).sqrt() for n in norms]  # type: ignore[operator]
    shift = sum(
        n.bias - n.running_mean * f  # type: ignore[operator]
        for n, f in zip(norms, factors, strict=True)
    )
    model, _ = linearize(net)
    block = model.get_submodule("block")
    assert isinstance(block, LinearBlock)
    assert block.scaling is not None
    assert_same(block.scaling.detach(), torch.stack(factors).detach(), 1e-12)
    for name, kernel in zip(("origin", "pointwise"), kernels, strict=True):
        assert torch.equal(block.branches[name].weight, kernel)
    assert isinstance(block.norm, nn.BatchNorm2d)
    assert isinstance(shift, Tensor)
    assert_same(block.norm.bias.detach(), shift.detach(), 1e-12)


def test_the_plan_names_the_branches_and_touches_nothing() -> None:
    net = branch_net()
    with untouched(net):
        made = linearize_plan(net)
    branch = "Conv2d - BatchNorm2d"
    assert [(e.path, e.before, e.after) for e in made.edits] == [
        ("first", f"{branch} + {branch}", "linear block with 2 branches"),
        ("second", f"{branch} + {branch} + BatchNorm2d", "linear block with 3 branches"),
        ("third", f"{branch} + {branch} + BatchNorm2d", "linear block with 3 branches"),
    ]
    model, _ = linearize(net)
    for edit in made.edits:
        own = sum(p.numel() for p in model.get_submodule(edit.path).parameters())
        assert edit.parameters[1] == own


class Long(nn.Module):
    """A sum with a branch of the user's making beside a 3x3."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.large, self.branch = conv_norm(6, 6, 3, padding=1), branch

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.large(x) + self.branch(x))


class InnerSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


class NormBehindInnerSum(InnerSum):
    """An inner sum whose norm stands for both of its branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def stretched() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1))


FLATTENED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "conv - norm - conv": (stretched, ["origin", "pointwise_pointwise"]),
    "sum in a branch": (InnerSum, ["origin", "pointwise", "pointwise_2"]),
    "norm behind an inner sum": (NormBehindInnerSum, ["origin", "pointwise", "pointwise_2"]),
}


@pytest.mark.parametrize(("build", "names"), FLATTENED.values(), ids=FLATTENED)
def test_long_branches_and_inner_sums_are_flattened(
    build: Callable[[], nn.Module], names: list[str]
) -> None:
    net, x = randomise_norms(Long(build()).double()), wide()
    expected = output(net, x)
    model, made = linearize(net)
    assert len(made.edits) == 1
    block = model.get_submodule("block")
    assert isinstance(block, LinearBlock)
    assert list(block.branches) == names
    assert_same(output(model, x), expected, 1e-12)


def conv_behind_sum() -> nn.Module:
    return nn.Sequential(InnerSum(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "conv behind an inner sum": (
        lambda: Long(conv_behind_sum()),
        [
            "its branches have no norms: it is linear already",
            "a branch of its sum is not linear as a whole: Conv2d and a sum of 2 branches stand "
            "one behind the other, and each of these would need a copy of its kernel",
        ],
    ),
    "no norms": (InnerSum, ["its branches have no norms: it is linear already"]),
}


@pytest.mark.filterwarnings("ignore::orepa_compiler.NothingExpandedWarning")
@pytest.mark.parametrize(("build", "texts"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_and_why(build: Callable[[], nn.Module], texts: list[str]) -> None:
    net, x = randomise_norms(build().double()), wide()
    made = linearize_plan(net)
    assert made.edits == ()
    assert [r.reason for r in made.refusals] == texts
    assert {r.done_by for r in made.refusals} == {"linearize"}
    expanded = orepa.expand(net, block=orepa.OREPA)
    assert_same(output(expanded, x), output(net, x))


class Moody(nn.Module):
    """Branches in a forward that asks for its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = conv_norm(6, 6, 3, padding=1), conv_norm(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + self.small(x)
        return F.dropout(y, 0.5, self.training)


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_asks_for_its_mode_still_does(training: bool) -> None:
    net, x = randomise_norms(Moody().double()).train(training), wide()
    expected = output(net, x)
    made = linearize_plan(net)
    assert made.edits == ()
    assert [refusal.reason for refusal in made.refusals] == [
        "its forward differs between train and eval mode, and a rewritten one could not"
    ]
    expanded = orepa.expand(net, block=orepa.OREPA)
    assert_same(output(expanded, x), expected)
    assert (output(expanded, x, training=True) == 0).double().mean() > 0.3


def test_expand_extends_a_linearized_block() -> None:
    x, net = batch(), branch_net()
    expanded = orepa.expand(net, block=orepa.OREPA)
    block = expanded.get_submodule("second.block")
    assert isinstance(block, LinearBlock)
    assert list(block.branches) == [
        "origin",
        "pointwise",
        "identity",
        "pointwise_kernel",
        "average",
        "frequency",
        "depthwise_pointwise",
    ]
    assert block.scaling is not None
    assert block.scaling.shape == (7, 6)
    assert_same(output(expanded, x), output(net, x), 1e-10)
    train_a_step(expanded, x)
    assert_same(output(orepa.collapse(expanded), x), output(expanded, x))


def test_the_plan_counts_the_parameters_of_an_extended_block() -> None:
    made = orepa.plan(branch_net(), block=orepa.OREPA)
    expanded = orepa.expand(branch_net(), block=orepa.OREPA)
    for edit in made.of("expand").edits:
        before = next(e for e in made.of("linearize").edits if edit.path.startswith(e.path))
        own = sum(p.numel() for p in expanded.get_submodule(edit.path).parameters())
        assert edit.parameters == (before.parameters[1], own)


def test_where_leaves_an_owner_alone() -> None:
    _, made = linearize(branch_net(), where="!second*")
    assert [edit.path for edit in made.edits] == ["first", "third"]


@pytest.mark.parametrize("where", ["second", "second*", "!first*,!third*"])
def test_where_chooses_which_linearized_blocks_are_extended(where: str) -> None:
    model, _ = linearize(branch_net())
    for net in (model, branch_net()):
        expanded = orepa.expand(net, block=orepa.OREPA, where=where.split(","))
        blocks = {p: m for p, m in expanded.named_modules() if isinstance(m, LinearBlock)}
        extended = [path for path, block in blocks.items() if "frequency" in block.branches]
        assert extended == ["second.block"]


def test_frozen_branches_stay_frozen() -> None:
    net = branch_net()
    net.get_submodule("second").requires_grad_(False)
    expanded = orepa.expand(net, block=orepa.OREPA)
    assert not any(p.requires_grad for p in expanded.get_submodule("second").parameters())
    assert all(p.requires_grad for p in expanded.get_submodule("third").parameters())


class Quiet(nn.Module):
    """RepVGG's sum without an activation, so that the next layer would join it."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = conv_norm(6, 6, 3, padding=1), conv_norm(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)


@pytest.mark.parametrize("behind", [nn.ReLU, lambda: nn.BatchNorm2d(6), nn.Identity])
def test_a_sum_is_found_whatever_stands_behind_its_owner(behind: Callable[[], nn.Module]) -> None:
    net, x = randomise_norms(nn.Sequential(Quiet(), behind()).double()), wide()
    expected = output(net, x)
    assert [edit.path for edit in linearize_plan(net).edits] == ["0"]
    assert_same(output(linearize(net)[0], x), expected, 1e-12)


def test_auto_leaves_branches_with_norms_as_they_are() -> None:
    net, x = branch_net(), batch()
    before = fingerprint(net)
    expanded = orepa.expand(net)
    assert fingerprint(net) == before
    blocks = [m.block_name for m in expanded.modules() if isinstance(m, LinearBlock)]
    assert blocks == ["OREPA", "OREPA_1X1"] * 3
    assert_same(output(expanded, x, training=True), output(net, x, training=True))
