"""Linearize on the offline blocks that expand makes: Hu et al. 2022, Table 2, offline to online."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.blocks import LINEARIZED, Block, LinearBlock
from orepa_compiler.blocks.catalogue import ACNET, DBB, MOBILEONE, OREPA_VGG
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.branches import Kernel
from orepa_compiler.branches.sequences import LayerSequence
from orepa_compiler.passes import Linearize, Pipeline, Squeeze
from orepa_compiler.planning import Plan
from tests.branch_nets import DiverseBranches, offline_net
from tests.compiler_nets import assert_same, bare_net, batch, output, stem_net, train_a_step
from tests.norms import randomise_norms


def linearized(net: nn.Module) -> tuple[nn.Module, Plan]:
    return Pipeline((Linearize(), Squeeze())).run(copy.deepcopy(net))


def offline(block: Block, *, bare: bool = False) -> nn.Module:
    """A net with offline blocks whose norms have been trained."""
    net = orepa.expand(bare_net() if bare else stem_net(), block=block)
    assert any(isinstance(module, OfflineBlock) for module in net.modules())
    return randomise_norms(net)


@pytest.mark.parametrize("bare", [False, True], ids=["norms follow", "no norm follows"])
@pytest.mark.parametrize("block", [DBB, ACNET, MOBILEONE, OREPA_VGG], ids=lambda b: b.name)
def test_an_offline_block_becomes_its_online_form(block: Block, bare: bool) -> None:
    net, x = offline(block, bare=bare), batch()
    names = {p: list(m.branches) for p, m in net.named_modules() if isinstance(m, OfflineBlock)}
    expected = output(net, x)
    model, made = linearized(net)
    assert [edit.path for edit in made.of("linearize").edits] == list(names)
    for edit in made.of("linearize").edits:
        new = model.get_submodule(edit.path)
        assert isinstance(new, LinearBlock)
        assert new.block_name == LINEARIZED
        assert list(new.branches) == names[edit.path]
        assert (new.norm is not None) == bare
        assert edit.before == f"{block.name}: {' + '.join(names[edit.path])}"
        sizes = [sum(p.numel() for p in m.get_submodule(edit.path).parameters())
                 for m in (net, model)]  # fmt: skip
        assert list(edit.parameters) == sizes
    assert_same(output(model, x), expected, 1e-12)
    train_a_step(model, x)
    assert_same(output(orepa.collapse(model), x), output(model, x))


def test_layers_keep_their_kernels() -> None:
    net = offline(DBB)
    model, _ = linearized(net)
    old, new = net.get_submodule("conv.branches"), model.get_submodule("conv.branches")
    assert isinstance(new.get_submodule("origin"), Kernel)
    assert torch.equal(
        new.get_parameter("origin.weight"), old.get_parameter("origin.branch.weight")
    )
    stack = new.get_submodule("pointwise_kernel")
    assert isinstance(stack, LayerSequence)
    kernel = old.get_parameter("pointwise_kernel.branch.kernel")
    assert torch.equal(stack.get_parameter("stack.2.weight"), kernel)
    norm = old.get_submodule("pointwise_kernel.norms.0")
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    inner = stack.get_parameter("stack.1.weight").detach().flatten()
    assert_same(inner, scale.detach(), 1e-12)  # type: ignore[arg-type]


def test_branches_of_one_layer_stay_what_they_are() -> None:
    net = offline(OREPA_VGG)
    model, _ = linearized(net)
    old, new = net.get_submodule("conv.branches"), model.get_submodule("conv.branches")
    for name in ("origin", "pointwise", "identity"):
        one, other = old.get_submodule(f"{name}.branch"), new.get_submodule(name)
        assert type(one) is type(other)
        assert one.state_dict().keys() == other.state_dict().keys()


def test_asking_for_an_online_block_linearizes_and_extends() -> None:
    net, x = offline(DBB), batch()
    expanded = orepa.expand(net, block=orepa.OREPA, where="conv", inputs=x)
    block = expanded.get_submodule("conv")
    assert isinstance(block, LinearBlock)
    assert block.branches.keys() == orepa.OREPA.branches.keys()
    assert isinstance(expanded.get_submodule("stem"), OfflineBlock)
    assert_same(output(expanded, x), output(net, x), 1e-10)


@pytest.mark.parametrize("block", ["auto", DBB])
def test_offline_blocks_stay_unless_an_online_one_is_asked_for(block: Block) -> None:
    net = offline(DBB)
    again = orepa.expand(net, block=block)
    kinds = [[p for p, m in n.named_modules() if isinstance(m, OfflineBlock)] for n in (net, again)]
    assert kinds[0] == kinds[1]


def test_a_block_with_a_hook_stays() -> None:
    net = offline(DBB)
    net.get_submodule("conv.branches.origin").register_forward_hook(lambda *_: None)
    _, made = linearized(net)
    assert [edit.path for edit in made.of("linearize").edits] == ["stem", "depthwise"]
    assert [(r.path, r.layer) for r in made.refusals] == [("conv", "block DBB")]
    assert made.refusals[0].reason.startswith("it has a hook")


@pytest.mark.parametrize("own", [False, True], ids=["written by a user", "made by expand"])
def test_a_checkpoint_rebuilds_a_linearized_model(own: bool, tmp_path: Path) -> None:
    x = batch()
    first = offline(DBB) if own else randomise_norms(offline_net(DiverseBranches))
    second = orepa.expand(first, block=orepa.OREPA, inputs=x)
    train_a_step(second, x)
    path = orepa.save(second, tmp_path / "online.safetensors")
    restored = orepa.load(stem_net() if own else offline_net(DiverseBranches), path)
    assert_same(output(restored, x), output(second, x), 1e-12)
