"""Linearize on whole offline blocks: DBB, ACNet, RepVGG, RepViT, RepMixer, MobileOne, stacks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.blocks import LinearBlock, ReparamConv
from orepa_compiler.branches import Identity
from orepa_compiler.branches.sequences import FixedKernel, LayerSequence
from orepa_compiler.passes import Linearize, Pipeline, Squeeze
from tests.branch_nets import (
    BLOCKS,
    DiverseBranches,
    Excitation,
    NormAfterSum,
    NormAndPad,
    offline_net,
)
from tests.compiler_nets import assert_same, batch, output, train_a_step
from tests.norms import randomise_norms

# How far the outputs in train mode may go: batch variances are biased, running ones are not.
BATCH_VARIATION = 0.03

blocks = pytest.mark.parametrize(("build", "names"), BLOCKS.values(), ids=BLOCKS)


def linearized(net: nn.Module) -> nn.Module:
    return Pipeline((Linearize(), Squeeze())).run(copy.deepcopy(net))[0]


def blocks_of(model: nn.Module) -> dict[str, LinearBlock]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LinearBlock)}


@blocks
def test_outputs_in_eval_mode_stay_the_same(
    build: Callable[..., nn.Module], names: list[str]
) -> None:
    net, x = randomise_norms(offline_net(build)), batch()
    expected = output(net, x)
    model, made = Pipeline((Linearize(),)).run(copy.deepcopy(net))
    assert [edit.path for edit in made.edits] == ["first", "second"]
    assert not made.refusals
    second = list(blocks_of(model).values())[1]
    assert list(second.branches) == names
    assert not any(
        is_batch_norm(m) for branch in second.branches.values() for m in branch.modules()
    )
    assert_same(output(model, x), expected, 1e-12)
    squeezed = Pipeline((Squeeze(),)).run(model)[0]
    assert all(isinstance(block, ReparamConv) for block in blocks_of(squeezed).values())
    assert_same(output(squeezed, x), expected, 1e-12)
    assert_same(output(orepa.collapse(squeezed), x), expected, 1e-12)


@blocks
def test_the_plan_counts_the_parameters(build: Callable[..., nn.Module], names: list[str]) -> None:
    net = offline_net(build)
    model, made = Pipeline((Linearize(),)).run(copy.deepcopy(net))
    assert len(made.edits) == 2
    gone, come = (sum(edit.parameters[i] for edit in made.edits) for i in (0, 1))
    assert gone - come == sum(p.numel() for p in net.parameters()) - sum(
        p.numel() for p in model.parameters()
    )
    for edit in made.edits:
        block = next(m for path, m in blocks_of(model).items() if path.startswith(edit.path))
        assert edit.parameters[1] == sum(p.numel() for p in block.parameters())
        assert edit.after == f"linear block with {len(block.branches)} branches"


def settle(net: nn.Module, x: Tensor) -> None:
    """Running statistics as those of the batch."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(x)


@blocks
def test_a_calibrated_norm_keeps_the_outputs_in_train_mode(
    build: Callable[..., nn.Module], names: list[str]
) -> None:
    net, x = randomise_norms(offline_net(build)), batch(8, 16)
    settle(net, x)
    expanded = orepa.expand(net, block=orepa.OREPA, inputs=x)
    assert_same(output(expanded, x), output(net, x), 1e-12)
    before, after = (output(model, x, training=True) for model in (net, expanded))
    assert_same(after, before, BATCH_VARIATION)
    if build is NormAfterSum:  # its own norm follows: nothing to calibrate
        return
    assert_same(after, output(net, x), 1e-10)
    uncalibrated = orepa.expand(net, block=orepa.OREPA)
    wrong = output(uncalibrated, x, training=True)
    assert (wrong - before).abs().max() > 3 * BATCH_VARIATION * before.abs().max()


@blocks
def test_a_step_trains_every_layer_and_collapses(
    build: Callable[..., nn.Module], names: list[str]
) -> None:
    net, x = randomise_norms(offline_net(build)), batch()
    expanded = orepa.expand(net, block=orepa.OREPA, inputs=x)
    second = list(blocks_of(expanded).values())[1]
    assert set(names) < set(second.branches)
    assert {"pointwise_kernel", "frequency"} < set(second.branches)
    before = {name: p.detach().clone() for name, p in second.named_parameters()}
    train_a_step(expanded, x)
    moved = {n for n, p in second.named_parameters() if not torch.equal(p, before[n])}
    # a filter of zero scaling moves by its scaling first; a bias before a norm has no effect
    still = before.keys() - moved - ({"bias"} if build is NormAfterSum else set())
    assert still == {"branches.frequency.weight"}
    assert_same(output(orepa.collapse(expanded), x), output(expanded, x))
    assert not any(map(is_batch_norm, orepa.collapse(expanded).modules()))


def test_the_layers_between_are_trained_one_by_one() -> None:
    net = randomise_norms(offline_net(DiverseBranches))
    offline = net.get_submodule("second")
    block = linearized(net).get_submodule("second.block")
    assert isinstance(block, LinearBlock)
    stacked, average = block.branches["pointwise_kernel"], block.branches["average"]
    assert isinstance(stacked, LayerSequence)
    assert isinstance(average, LayerSequence)
    first, inner, second = stacked.stack
    assert torch.equal(first.weight, offline.get_parameter("stacked.first.weight"))
    assert torch.equal(second.weight, offline.get_parameter("stacked.second.weight"))
    norm = offline.get_submodule("stacked.inner.bn")
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    assert_same(inner.weight.detach().flatten(), scale.detach(), 1e-12)  # type: ignore[operator]
    assert inner.pads == ((1, 1), (1, 1))
    assert isinstance(average.stack[2], FixedKernel)
    assert not list(average.stack[2].parameters())


def test_frozen_layers_stay_frozen_one_by_one() -> None:
    net = offline_net(DiverseBranches)
    for name in ("stacked.first", "pointwise.conv", "average.inner"):
        net.get_submodule(f"second.{name}").requires_grad_(False)
    block = linearized(net).get_submodule("second.block")
    frozen = {name for name, p in block.named_parameters() if not p.requires_grad}
    assert frozen == {
        "branches.pointwise.weight",
        "branches.pointwise_kernel.stack.0.weight",
        "branches.average.stack.1.weight",
    }


def test_linear_blocks_gain_the_branches_of_the_block_that_suits_them() -> None:
    model, x = linearized(randomise_norms(offline_net(DiverseBranches))), batch()
    expanded = orepa.expand(model)
    assert_same(output(expanded, x), output(model, x), 1e-12)
    grown = [e for e in orepa.recorded_plans(expanded)[-1].edits if e.options.get("extends")]
    assert grown
    assert {edit.options["block"] for edit in grown} <= {orepa.OREPA.name, orepa.OREPA_1X1.name}


def test_squeeze_and_excitation_is_kept_behind_the_block() -> None:
    model = linearized(offline_net(BLOCKS["RepVGG with SE"][0]))
    assert isinstance(model.get_submodule("second.excitation"), Excitation)
    assert isinstance(model.get_submodule("second.block.branches.identity"), Identity)


def test_channels_last_kernels_stay_so() -> None:
    net = offline_net(DiverseBranches).to(memory_format=torch.channels_last)
    block = linearized(net).get_submodule("second.block")
    kernel = block.get_parameter("branches.origin.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last)


class Beside(nn.Module):
    """A 3 x 3 conv with its norm, and a branch of the test's beside it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.dense(x) + self.branch(x))


class Shifted(NormAndPad):
    """A border that is not what the norm makes of zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(self.bn(x), [self.padding] * 4, value=0.1)


def point(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(6, 6, 1, **options)


BORDER = (
    "a branch of its sum is not linear as a whole: border: the first conv has a bias, so what it "
    "gives beyond the border is the bias and not the zeros that padding (1, 1) puts there; pad "
    "with that bias, or put the padding on the first conv"
)
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a norm, then a padded conv": (
        lambda: Beside(point(), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)),
        BORDER,
    ),
    "a padded conv behind another": (
        lambda: Beside(nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)),
        "a branch of its sum is not linear as a whole: border: padding (1, 1) before the second "
        "conv cuts off what the first one (kernel (3, 3)) gives beyond the border; put all the "
        "padding on the first conv",
    ),
    "a bias before a padded norm": (
        lambda: Beside(point(), NormAndPad(6, 1), nn.Conv2d(6, 6, 3)),
        BORDER,
    ),
    "an average without the padding": (
        lambda: Beside(point(bias=False), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        "a branch of its sum is not linear as a whole: border: average pooling with "
        "count_include_pad=False divides by another number there",
    ),
    "costs more as one conv": (
        lambda: nn.Sequential(Bottleneck(), nn.ReLU()),
        "as one conv it would cost 324 MACs for each output position, apart it costs 96; kept "
        "apart",
    ),
}


class Bottleneck(nn.Module):
    """The input beside a depthwise and a pointwise conv without an activation between."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.pointwise, self.norm = point(bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.pointwise(self.depthwise(x)))


@pytest.mark.parametrize(("build", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_and_why(build: Callable[[], nn.Module], text: str) -> None:
    net = randomise_norms(build().double())
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    expected = output(net, x)
    model, made = Pipeline((Linearize(),)).run(copy.deepcopy(net))
    assert not made.edits
    assert [refusal.reason for refusal in made.refusals] == [text]
    assert_same(output(model, x), expected, 1e-12)


def test_a_norm_that_pads_with_something_else_is_none() -> None:
    net = Beside(point(bias=False), Shifted(6, 1), nn.Conv2d(6, 6, 3)).double()
    assert not Pipeline((Linearize(),)).run(net)[1].edits


def test_a_branch_that_holds_a_block_is_refused() -> None:
    expanded = orepa.expand(offline_net(DiverseBranches), where="second.origin.*")
    made = orepa.plan(expanded, block=orepa.OREPA).of("linearize")
    assert [edit.path for edit in made.edits] == ["first"]
    assert [(r.path, r.reason) for r in made.refusals] == [
        (
            "second",
            "a branch holds a block already; linearize before its convs are expanded",
        )
    ]


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_real_nets(name: str) -> None:
    timm = pytest.importorskip("timm")
    net = randomise_norms(timm.create_model(name).double())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = output(net, x)
    model, made = Pipeline((Linearize(), Squeeze())).run(copy.deepcopy(net))
    assert len(made.of("linearize").edits) == {"repvgg_a0": 22, "mobileone_s0": 43}[name]
    assert_same(output(model, x), expected, 1e-12)
    train_a_step(model, x)
    assert_same(output(orepa.collapse(model), x), output(model, x))


class Inside(nn.Module):
    """A branch whose kernel stands in the forward itself, and one that is scaled and pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 1, 3, 3))
        self.norm, self.pooled_norm = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.pool, self.gamma = nn.AvgPool2d(3, 1, 1), nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(F.conv2d(x, self.kernel, padding=1, groups=6))
        return torch.relu(y + self.pooled_norm(self.pool(x * self.gamma)))


def test_functions_of_a_forward_are_layers_too() -> None:
    net, x = randomise_norms(Inside().double()), torch.randn(2, 6, 9, 9, dtype=torch.float64)
    expected = output(net, x)
    model, made = Pipeline((Linearize(), Squeeze())).run(copy.deepcopy(net))
    (edit,) = made.of("linearize").edits
    assert edit.before == "conv - BatchNorm2d + scaling - AvgPool2d - BatchNorm2d"
    assert_same(output(model, x), expected, 1e-12)
    block = model.get_submodule("block")
    assert isinstance(block, LinearBlock)
    assert list(block.branches) == ["origin", "average"]
    trained = {name: p.numel() for name, p in block.branches.named_parameters()}
    assert trained == {"origin.weight": 54, "average.stack.0.weight": 6}
    train_a_step(model, x)
    assert_same(output(orepa.collapse(model), x), output(model, x))


def test_branches_of_a_depthwise_block_may_begin_with_a_pool() -> None:
    net = Beside(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(6)).double()
    net.dense[0] = nn.Conv2d(6, 6, 3, padding=1, groups=6).double()
    randomise_norms(net)
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    expected = output(net, x)
    model = linearized(net)
    assert list(model.get_submodule("block.branches")._modules) == ["origin", "average"]
    assert_same(output(model, x), expected, 1e-12)


def test_padding_at_the_end_of_a_branch_stays_its_last_layer() -> None:
    net = Beside(point(bias=False), NormAndPad(6, 1)).double()
    net.dense[0] = nn.Conv2d(6, 6, 3, padding=2).double()
    randomise_norms(net)
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    expected = output(net, x)
    model = linearized(net)
    assert list(model.get_submodule("block.branches")._modules) == ["origin", "pointwise"]
    assert_same(output(model, x), expected, 1e-12)
