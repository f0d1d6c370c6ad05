"""Offline blocks in a net: expand, calibrate, train, collapse, load back, save and load."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm.layers
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler import DBB, OREPA, OREPA_VGG, REPVGG, Block, ReparamError, mobileone
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.branches import Kernel, Pointwise
from orepa_compiler.errors import NotLinear
from orepa_compiler.passes.collapse.bias import norm_behind
from orepa_compiler.training.calibration import inserted_norms
from tests.compiler_nets import (
    Inline,
    assert_same,
    bare_net,
    batch,
    fingerprint,
    output,
    same_state,
    stem_net,
    train_a_step,
    untouched,
)
from tests.norms import randomise_norms

BLOCKS = [
    *(orepa.OREPA_VGG, orepa.DBB, orepa.REPVGG, orepa.ACNET, orepa.MOBILEONE),
    replace(OREPA, name="OREPA_OFFLINE", scaling_layer="norm"),
]
EVERY_BLOCK = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
EXACT = 1e-12


def offline_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, OfflineBlock)]


@EVERY_BLOCK
def test_expand_keeps_the_outputs_in_eval_mode(block: Block) -> None:
    net, x = stem_net(), batch()
    with untouched(net):
        expanded = orepa.expand(net, block=block)
    assert "conv" in offline_paths(expanded)
    assert_same(output(expanded, x), output(net, x), EXACT)


@EVERY_BLOCK
def test_after_training_it_collapses_and_loads_into_the_stock_net(block: Block) -> None:
    net, x = stem_net(), batch()
    expanded = orepa.expand(net, block=block)
    train_a_step(expanded, x)
    randomise_norms(expanded, 3)
    trained = output(expanded, x)
    deploy = orepa.collapse(expanded)
    assert_same(output(deploy, x), trained, EXACT)
    assert not any(map(is_batch_norm, deploy.modules()))
    kept = orepa.collapse(expanded, fold_norm=False)
    fresh = stem_net()
    fresh.load_state_dict(kept.state_dict(), strict=True)  # `conv` has no bias, `depthwise` one
    assert_same(output(fresh, x), trained, EXACT)


@EVERY_BLOCK
def test_calibration_gives_every_branch_norm_its_statistics(block: Block) -> None:
    net, x = bare_net(), batch(16, 12)
    expanded = orepa.expand(net, block=block, inputs=x)
    assert_same(output(expanded, x), output(net, x), EXACT)
    first = expanded.get_submodule("conv1")
    norms = {path: norm for path, norm in inserted_norms(expanded).items() if "conv1" in path}
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in first.modules()) > 1
    assert all((norm.running_mean != 0).any() for norm in norms.values())  # type: ignore[union-attr]
    # in train mode the first block meets the very statistics that its norms were given; what is
    # left is the border of a layer behind a norm, and the variance with or without bias
    assert_same(first.train()(x), net[0](x), 1e-5)
    uncalibrated = orepa.expand(net, block=block).get_submodule("conv1").train()
    assert (uncalibrated(x) - net[0](x)).abs().max() > 0.1 * net[0](x).abs().max()


def test_a_second_calibration_keeps_the_function() -> None:
    x = batch(16, 12)
    once = orepa.expand(bare_net(), block=DBB, where="conv1", inputs=x)
    train_a_step(once, x)
    twice = orepa.expand(once, block=DBB, inputs=x + 0.5)
    assert offline_paths(twice) == ["conv1", "conv2"]
    assert_same(output(twice, x), output(once, x), EXACT)


def test_no_norm_is_inserted_behind_it_and_no_squeeze_is_planned() -> None:
    made = orepa.plan(bare_net(), block=REPVGG)
    for edit in made.of("expand").edits:
        assert (edit.options["norm"], edit.options["scaling"]) == (False, "norm")
        assert edit.note == ""
    assert not made.of("squeeze").edits
    expanded = orepa.expand(bare_net(), block=REPVGG)
    assert all(block.norm is None for block in expanded.modules() if isinstance(block, ConvBlock))


def test_the_plan_counts_what_branches_cost_on_feature_maps() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
    (edit,) = orepa.plan(net, block=REPVGG, inputs=torch.rand(1, 4, 6, 6)).of("expand").edits
    assert edit.macs == (36 * 8 * 4 * 9, 36 * 8 * 4 * 10)
    (edit,) = orepa.plan(net, block=OREPA, inputs=torch.rand(1, 4, 6, 6)).of("expand").edits
    assert edit.macs == (36 * 8 * 4 * 9,) * 2


@pytest.mark.parametrize("block", [OREPA_VGG, DBB], ids=lambda block: block.name)
def test_save_load_and_a_plan_applied_again(tmp_path: Path, block: Block) -> None:
    x = batch()
    expanded = orepa.expand(stem_net(), block=block)
    train_a_step(expanded, x)
    for name, model in (("expanded", expanded), ("collapsed", orepa.collapse(expanded))):
        loaded = orepa.load(stem_net, orepa.save(model, tmp_path / f"{name}.safetensors"))
        assert same_state(loaded, model)
        assert_same(output(loaded, x), output(model, x), EXACT)
    again = orepa.expand(stem_net(), plan=orepa.plan(stem_net(), block=block))
    assert offline_paths(again) == offline_paths(expanded)


def test_a_block_of_ones_own_is_named_to_load(tmp_path: Path) -> None:
    block = mobileone(2)
    expanded = orepa.expand(stem_net(), block=block)
    path = orepa.save(expanded, tmp_path / "two.safetensors")
    assert same_state(orepa.load(stem_net, path, block=block), expanded)
    with pytest.raises(orepa.CheckpointError, match="the plan asks for block 'MOBILEONE_2'"):
        orepa.load(stem_net, path)


def test_copies_and_verify() -> None:
    x = batch(dtype=torch.float32)
    expanded = orepa.expand(stem_net(torch.float32), block=OREPA_VGG).eval()
    for twin in (copy.deepcopy(expanded), pickle.loads(pickle.dumps(expanded))):
        assert torch.equal(twin(x), expanded(x))
    assert orepa.verify(expanded, orepa.collapse(expanded), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_layout_and_requires_grad(dtype: torch.dtype) -> None:
    net = stem_net(dtype).to(memory_format=torch.channels_last)
    net.depthwise.requires_grad_(False)
    expanded = orepa.expand(net, block=DBB)
    assert {p.dtype for p in expanded.parameters()} == {dtype}
    block = expanded.get_submodule("conv")
    kernel = block.get_parameter("branches.origin.branch.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert all(p.requires_grad for p in block.parameters())
    assert not any(p.requires_grad for p in expanded.get_submodule("depthwise").parameters())
    deploy = orepa.collapse(expanded)
    assert deploy.get_parameter("conv.weight").is_contiguous(memory_format=torch.channels_last)
    x = batch(dtype=dtype)
    assert_same(output(deploy, x), output(expanded, x))


def test_a_model_in_training_form_is_not_exported(tmp_path: Path) -> None:
    expanded = orepa.expand(bare_net(torch.float32), block=REPVGG).eval()
    with pytest.raises(orepa.ExportError, match=r"^conv1: still in training form \(2 such blocks"):
        orepa.export_onnx(expanded, batch(dtype=torch.float32), tmp_path / "net.onnx")


def test_a_hook_in_a_branch_keeps_the_block_and_its_norms_are_not_spoken_of() -> None:
    expanded = orepa.expand(bare_net(), block=REPVGG)
    norm = next(iter(inserted_norms(expanded).values()))
    norm.register_forward_hook(lambda module, args, output: None)
    (refusal,) = orepa.recorded_plans(orepa.collapse(expanded))[-1].refusals
    assert (refusal.path, refusal.layer) == ("conv1", "block REPVGG")
    assert "it has a hook" in refusal.reason


def inline(forward: Callable[..., object], **layers: nn.Module) -> Inline:
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    return Inline(forward, conv=conv, norm=nn.BatchNorm2d(3), relu=nn.ReLU(), **layers).double()


ALONE: dict[str, Callable[[], nn.Module]] = {
    "right behind": lambda: inline(lambda n, x: n.relu(n.norm(n.conv(x)))),
    "in another module": lambda: inline(
        lambda n, x: n.tail(n.conv(x)), tail=nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    ),
    "with an activation": lambda: inline(
        lambda n, x: n.act(n.conv(x)), act=timm.layers.BatchNormAct2d(3)
    ),
}
NOT_ALONE: dict[str, Callable[[], nn.Module]] = {
    "an activation": lambda: inline(lambda n, x: n.relu(n.conv(x))),
    "another reader": lambda: inline(lambda n, x: n.norm(y := n.conv(x)) + n.relu(y)),
    "the norm reads more": lambda: inline(lambda n, x: n.norm(n.relu(n.norm(n.conv(x))))),
    "another norm": lambda: inline(lambda n, x: n.group(n.conv(x)), group=nn.GroupNorm(1, 3)),
    "no statistics": lambda: inline(
        lambda n, x: n.batch(n.conv(x)), batch=nn.BatchNorm2d(3, track_running_stats=False)
    ),
}


@pytest.mark.parametrize("build", ALONE.values(), ids=ALONE)
def test_the_norm_behind_takes_what_a_conv_without_bias_cannot(
    build: Callable[[], nn.Module],
) -> None:
    net, x = randomise_norms(build()), batch()
    expanded = orepa.expand(net, block=REPVGG, where="conv")
    train_a_step(expanded, x)
    randomise_norms(expanded, 2)
    before = fingerprint(expanded)
    kept = orepa.collapse(expanded, fold_norm=False)
    assert fingerprint(expanded) == before
    net.load_state_dict(kept.state_dict(), strict=True)
    assert_same(output(net, x), output(expanded, x), EXACT)
    (edit,) = orepa.recorded_plans(kept)[-1].edits
    assert edit.parameters[1] == kept.get_parameter("conv.weight").numel()


@pytest.mark.parametrize("build", NOT_ALONE.values(), ids=NOT_ALONE)
def test_where_nothing_can_take_it_the_conv_is_named(build: Callable[[], nn.Module]) -> None:
    expanded = orepa.expand(build(), block=REPVGG, where="conv")
    with untouched(expanded), pytest.raises(ReparamError) as caught:
        orepa.collapse(expanded, fold_norm=False)
    assert str(caught.value) == (
        "conv: the norms of its branches need a bias to go to, the original conv has none, and no "
        "BatchNorm is known to be all that reads it; use fold_norm=True"
    )


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.part(x))


def test_a_norm_in_a_module_that_is_called_twice_takes_nothing() -> None:
    from orepa_compiler.capture import capture
    from orepa_compiler.passes import is_leaf

    whole = capture(Twice(), training=False, is_leaf=is_leaf)
    with pytest.raises(NotLinear, match="no BatchNorm is known to be all that reads it"):
        norm_behind(whole, "part.conv")
    part = capture(Twice().part, training=False, is_leaf=is_leaf)
    assert norm_behind(part, "conv") == "norm"


ONLINE = "give a block without norms, as by replace(block, scaling_layer='vector')"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own forward": (
        lambda: nn.Sequential(timm.layers.StdConv2d(3, 4, 3), nn.BatchNorm2d(4)),
        "StdConv2d has a forward of its own, and branches that normalize run in its place; ",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)),
        "ConvTranspose2d is a transposed conv, and branches that normalize run in its place; ",
    ),
    "called twice": (
        lambda: Inline(
            lambda n, x: n.get_submodule("0")(n.get_submodule("0")(x)),
            **{"0": nn.Conv2d(3, 3, 3)},
        ),
        "it is called several times, so the statistics of its branches would be mixed; ",
    ),
    "nothing applies": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()),
        "block REPVGG has no branch beside the kernel of a Conv2d 3 -> 4 1x1",
    ),
}


@pytest.mark.parametrize(("build", "text"), REFUSED.values(), ids=REFUSED)
def test_where_no_offline_block_can_stand(build: Callable[[], nn.Module], text: str) -> None:
    (refusal,) = orepa.plan(build(), block=REPVGG, where="0").refusals
    assert refusal.reason == text + (ONLINE if text.endswith("; ") else "")


def test_an_origin_that_cannot_hold_a_kernel_is_named() -> None:
    block = Block("MINE", {"origin": Pointwise, "kernel": Kernel}, {})
    with pytest.raises(ReparamError) as caught:
        orepa.expand(bare_net(), block=block)
    assert str(caught.value) == (
        "the origin of block MINE is a Pointwise, which cannot be set to any kernel; make it a "
        "Kernel, or use init='paper'"
    )
    assert orepa.expand(bare_net(), block=block, init="paper") is not None


def test_paper_init_starts_each_norm_fresh() -> None:
    block = orepa.expand(bare_net(), block=REPVGG, init="paper").get_submodule("conv2")
    assert isinstance(block, OfflineBlock)
    assert list(block.branches) == ["origin", "pointwise", "identity"]
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        assert torch.allclose(norm.weight, torch.ones_like(norm.weight), atol=1e-5)
