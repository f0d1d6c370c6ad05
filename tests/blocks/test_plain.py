"""Blocks in the hands of converters written for other blocks: timm's, RepVGG's, MobileOne's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.errors import NotLinear
from tests.branch_nets import DiverseBranches, offline_net
from tests.compiler_nets import (
    CONVS,
    assert_same,
    bare_net,
    batch,
    output,
    same_state,
    stem_net,
    train_a_step,
    untouched,
)
from tests.norms import randomise_norms


def expanded_nets() -> dict[str, Callable[[], nn.Module]]:
    return {
        "path": lambda: orepa.expand(stem_net()),
        "inserted norms": lambda: orepa.expand(bare_net(), block=orepa.OREPA, inputs=batch()),
        "linearized": lambda: orepa.expand(offline_net(DiverseBranches), block=orepa.OREPA),
    }


nets = pytest.mark.parametrize("build", expanded_nets().values(), ids=expanded_nets())


@nets
def test_timm_reparameterizes_an_expanded_model(build: Callable[[], nn.Module]) -> None:
    timm = pytest.importorskip("timm")
    model, x = build(), batch()
    train_a_step(model, x)
    model.eval()
    with untouched(model):
        plain = timm.utils.reparameterize_model(model)
    assert not any(isinstance(module, ConvBlock) for module in plain.modules())
    assert_same(output(plain, x), output(model, x), 1e-12)


@nets
@pytest.mark.parametrize("method", ["switch_to_deploy", "reparameterize"])
def test_a_converter_in_place_leaves_plain_convs(
    build: Callable[[], nn.Module], method: str
) -> None:
    model, x = build(), batch()
    train_a_step(model, x)
    expected = output(model, x)
    for module in model.modules():
        if hasattr(module, method):
            getattr(module, method)()
    assert not any(hasattr(module, method) for module in model.modules())
    assert any(type(module) is nn.Conv2d for module in model.modules())
    assert_same(output(model, x), expected, 1e-12)
    twin = copy.deepcopy(model)
    assert_same(output(twin, x), expected, 1e-12)


def test_a_plain_conv_loads_into_the_stock_model() -> None:
    model = orepa.expand(stem_net())
    train_a_step(model, batch())
    for path in CONVS:
        model.get_submodule(path).switch_to_deploy()  # type: ignore[operator]
    stock = stem_net()
    stock.load_state_dict(model.state_dict())
    assert same_state(stock, model)
    assert all(model.get_submodule(path).training for path in CONVS)


@pytest.mark.parametrize("form", ["auto", "linearized"])
def test_timm_reparameterizes_its_own_blocks_around_ours(form: str) -> None:
    timm = pytest.importorskip("timm")
    net = randomise_norms(timm.create_model("repvgg_a0", num_classes=5).double())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    block = "auto" if form == "auto" else orepa.OREPA
    where = ["stages.0.*", "stages.3.*"]
    model = orepa.expand(net, block=block, where=where).eval()
    plain = timm.utils.reparameterize_model(model)
    assert not any(isinstance(module, ConvBlock) for module in plain.modules())
    assert_same(output(plain, x), output(net, x), 1e-10)


def test_a_norm_that_is_not_affine_says_so() -> None:
    model = orepa.expand(bare_net(), block=orepa.OREPA)
    block = model.get_submodule("conv1")
    assert isinstance(block, ConvBlock)
    block.norm = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(NotLinear, match="the norm of the block: BatchNorm2d keeps no running"):
        block.fuse()
