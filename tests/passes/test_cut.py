"""Cut: blocks become plain convs again, or lose branches; and blocks that grow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler import OREPA
from orepa_compiler.blocks import ConvBlock, ReparamConv2d
from orepa_compiler.blocks.own_forward import OwnForwardConv
from orepa_compiler.errors import ReparamError
from tests.compiler_nets import (
    CONVS,
    assert_same,
    bare_net,
    batch,
    branch_net,
    output,
    stem_net,
    train_a_step,
    untouched,
)

SMALL = replace(
    OREPA,
    name="small",
    branches={name: OREPA.branches[name] for name in ("origin", "pointwise", "average")},
)


@pytest.fixture
def trained() -> nn.Module:
    """The path net as blocks, after a step."""
    expanded = orepa.expand(stem_net())
    train_a_step(expanded, batch())
    return expanded


def test_a_cut_model_is_the_one_before_expand_with_the_same_outputs(trained: nn.Module) -> None:
    x = batch()
    with untouched(trained):
        plain = orepa.cut(trained)
    for training in (False, True):
        expected = output(trained, x, training=training)
        assert_same(output(plain, x, training=training), expected, 1e-12)
    assert plain.training
    stock = stem_net()
    assert plain.state_dict().keys() == stock.state_dict().keys()
    for path in CONVS:
        conv = plain.get_submodule(path)
        assert type(conv) is nn.Conv2d
        assert conv.training
        assert conv.weight.requires_grad
    stock.load_state_dict(plain.state_dict())
    assert_same(output(stock, x), output(trained, x), 1e-12)


def test_where_chooses_the_blocks(trained: nn.Module) -> None:
    less = orepa.cut(trained, where=["conv", "pointwise"])
    assert {p for p, m in less.named_modules() if isinstance(m, ConvBlock)} == {
        "stem",
        "depthwise",
    }
    (plan,) = orepa.recorded_plans(less)[-1:]
    assert [(edit.done_by, edit.path, edit.after) for edit in plan.edits] == [
        ("cut", "conv", "plain conv"),
        ("cut", "pointwise", "plain conv"),
    ]
    for edit in plan.edits:
        assert edit.parameters[0] == count(trained.get_submodule(edit.path))
        assert edit.parameters[1] == count(less.get_submodule(edit.path))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_named_branches_go_into_the_origin(trained: nn.Module) -> None:
    x = batch()
    less = orepa.cut(trained, where="conv", branches=["average", "pointwise"])
    before, after = trained.get_submodule("conv"), less.get_submodule("conv")
    assert isinstance(before, ReparamConv2d)
    assert isinstance(after, ReparamConv2d)
    assert list(after.branches) == [
        "origin",
        "pointwise_kernel",
        "frequency",
        "depthwise_pointwise",
    ]
    assert before.scaling is not None
    assert after.scaling is not None
    assert torch.equal(after.scaling[1:], before.scaling[[2, 4, 5]])
    assert torch.equal(after.scaling[0], torch.ones_like(after.scaling[0]))
    scaled = before.branch_operators()
    gone = [scaled[name].weight for name in ("origin", "average")]
    taken = sum(gone) + nn.functional.pad(scaled["pointwise"].weight, (1, 1, 1, 1))
    assert_same(after.branches["origin"].weight.detach(), taken.detach(), 1e-12)  # type: ignore[union-attr]
    for training in (False, True):
        expected = output(trained, x, training=training)
        assert_same(output(less, x, training=training), expected, 1e-12)
    (edit,) = orepa.recorded_plans(less)[-1].edits
    assert edit.after == "origin + pointwise_kernel + frequency + depthwise_pointwise"
    assert edit.parameters == (count(before), count(after))
    train_a_step(less, x)
    assert_same(output(orepa.collapse(less), x), output(less, x))


def test_an_inserted_norm_stays_behind_the_origin_alone() -> None:
    x = batch()
    expanded = orepa.expand(bare_net(), block=orepa.OREPA, inputs=x)
    train_a_step(expanded, x)
    less = orepa.cut(expanded)
    block = less.get_submodule("conv1")
    assert isinstance(block, ReparamConv2d)
    assert list(block.branches) == ["origin"]
    assert block.scaling is None
    for training in (False, True):
        expected = output(expanded, x, training=training)
        assert_same(output(less, x, training=training), expected, 1e-12)
    train_a_step(less, x)
    deploy = orepa.collapse(less, fold_norm=False)
    assert deploy.state_dict().keys() == bare_net().state_dict().keys()
    assert_same(output(deploy, x), output(less, x))


class Standardized(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), True), self.bias)


def test_a_conv_with_a_forward_of_its_own_comes_back() -> None:
    net = nn.Sequential(Standardized(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    expanded = orepa.expand(net)
    assert isinstance(expanded[0], OwnForwardConv)
    train_a_step(expanded, batch())
    less = orepa.cut(expanded)
    assert type(less[0]) is Standardized
    assert_same(output(less, batch()), output(expanded, batch()), 1e-12)


def test_frozen_blocks_stay_frozen(trained: nn.Module) -> None:
    trained.get_submodule("conv").requires_grad_(False)
    less = orepa.cut(trained)
    assert not less.get_parameter("conv.weight").requires_grad
    assert less.get_parameter("stem.weight").requires_grad


def test_linearized_blocks_are_cut_too() -> None:
    x, expanded = batch(), orepa.expand(branch_net(), block=OREPA)
    less = orepa.cut(expanded, where="second*", branches="identity")
    assert "identity" not in less.get_submodule("second.block.branches")._modules
    assert_same(output(orepa.cut(less), x), output(expanded, x), 1e-12)


def test_a_checkpoint_rebuilds_a_cut_model(trained: nn.Module, tmp_path: Path) -> None:
    less = orepa.cut(orepa.cut(trained, where="stem"), where="conv", branches="average")
    path = orepa.save(less, tmp_path / "less.safetensors")
    restored = orepa.load(stem_net(), path)
    assert restored.state_dict().keys() == less.state_dict().keys()
    assert_same(output(restored, batch()), output(less, batch()), 1e-12)


ERRORS = {
    "no such place": (
        {"where": "layer9.*"},
        "where='layer9.*' selects no block of 4; the first is 'stem'",
    ),
    "no such branch": (
        {"where": "pointwise", "branches": ["average"]},
        "no selected block has a branch 'average'; they have origin, pointwise_pointwise",
    ),
    "the origin": (
        {"branches": "origin"},
        "the origin takes the kernels of other branches, so it cannot be cut; leave out branches= "
        "to make plain convs",
    ),
    "no branch": (
        {"branches": []},
        "branches= is empty; name some, or leave it out to cut all of them",
    ),
}


@pytest.mark.parametrize(("options", "text"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_cut(trained: nn.Module, options: dict[str, object], text: str) -> None:
    with untouched(trained), pytest.raises(ReparamError) as caught:
        orepa.cut(trained, **options)  # type: ignore[arg-type]
    assert str(caught.value) == text


def test_a_model_without_blocks_cannot_be_cut() -> None:
    with pytest.raises(ReparamError, match="selects no block of 0; expand the model first"):
        orepa.cut(stem_net())


def test_a_block_without_an_origin_is_cut_as_a_whole_only() -> None:
    expanded = orepa.expand(stem_net(), init="paper", block=orepa.DEEP_STEM, where="stem")
    with pytest.raises(ReparamError, match="stem: it has no origin branch to take the kernels"):
        orepa.cut(expanded, branches="deep_stem")
    assert_same(output(orepa.cut(expanded), batch()), output(expanded, batch()), 1e-12)


def test_a_block_with_a_hook_is_not_cut(trained: nn.Module) -> None:
    trained.get_submodule("conv").register_forward_hook(lambda *_: None)
    less = orepa.cut(trained)
    assert isinstance(less.get_submodule("conv"), ConvBlock)
    assert [(r.path, r.reason) for r in orepa.recorded_plans(less)[-1].refusals] == [
        ("conv", "it has a hook, which a rewrite would no longer call; remove the hook first")
    ]
    with pytest.raises(ReparamError, match="conv: it has a hook"):
        orepa.cut(trained, where="conv")


def test_a_block_with_norms_in_its_branches_is_not_cut() -> None:
    block = replace(OREPA, name="offline", scaling_layer="norm")
    expanded = orepa.expand(stem_net(), block=block, where="conv")
    with pytest.raises(ReparamError) as caught:
        orepa.cut(expanded)
    assert str(caught.value) == (
        "conv: its branches end in norms, so in train mode no conv does what it does; "
        "linearize it, or collapse the model"
    )


def test_expand_adds_convs_to_a_partly_expanded_model() -> None:
    x = batch()
    first = orepa.expand(stem_net(), where="conv")
    train_a_step(first, x)
    second = orepa.expand(first)
    assert {p for p, m in second.named_modules() if isinstance(m, ConvBlock)} == {*CONVS}
    assert [e.path for e in orepa.recorded_plans(second)[-1].of("expand").edits] == [
        "stem",
        "depthwise",
        "pointwise",
    ]
    for name, p in first.get_submodule("conv").named_parameters():
        assert torch.equal(p, second.get_submodule("conv").get_parameter(name))
    for training in (False, True):
        assert_same(output(second, x, training=training), output(first, x, training=training))


def test_expand_adds_missing_branches_where_a_larger_block_is_asked_for(tmp_path: Path) -> None:
    x = batch()
    first = orepa.expand(stem_net(), block=SMALL, where=["conv", "depthwise"])
    train_a_step(first, x)
    assert orepa.plan(first).of("expand").edits[0].path == "stem"  # auto leaves blocks as they are
    second = orepa.expand(first, block=OREPA, where="conv")
    (edit,) = orepa.recorded_plans(second)[-1].of("expand").edits
    assert edit.path == "conv"
    block = second.get_submodule("conv")
    assert isinstance(block, ReparamConv2d)
    assert block.branches.keys() == OREPA.branches.keys()
    assert list(second.get_submodule("depthwise").branches) == [*SMALL.branches]  # type: ignore[arg-type, union-attr]
    assert edit.parameters == (count(first.get_submodule("conv")), count(block))
    for training in (False, True):
        assert_same(output(second, x, training=training), output(first, x, training=training))
    train_a_step(second, x)
    assert_same(output(orepa.collapse(second), x), output(second, x))
    restored = orepa.load(stem_net(), orepa.save(second, tmp_path / "m.safetensors"), block=SMALL)
    assert_same(output(restored, x), output(second, x), 1e-12)
