"""map_optimizer: training goes on where it was when blocks come, grow and go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

import orepa_compiler as orepa
from orepa_compiler import OREPA
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.errors import ReparamError
from tests.compiler_nets import assert_same, bare_net, batch, branch_net, output, stem_net

# Branches that take no part: what is left is the origin, at v = 1.
SILENT = replace(OREPA, name="silent", scaling={**dict.fromkeys(OREPA.branches, 0.0)})
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "Adam": lambda p: Adam(p, lr=0.01, weight_decay=1e-2),
}


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    model.train()
    for step in range(steps):
        x = batch().roll(step, 0) * (1 + 0.1 * step)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def hold_scaling(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, ConvBlock) and module.scaling is not None:
            module.scaling.requires_grad_(False)


def expand_silently(model: nn.Module, where: str = "conv") -> nn.Module:
    expanded = orepa.expand(model, block=SILENT, where=where)
    hold_scaling(expanded)
    return expanded


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_alike_when_a_block_of_silent_branches_comes(
    make: Callable[[Any], Optimizer],
) -> None:
    stays, grows = stem_net(), stem_net()
    optimizers = [make(net.parameters()) for net in (stays, grows)]
    for net, optimizer in zip((stays, grows), optimizers, strict=True):
        train(net, optimizer, 3)
    expanded = expand_silently(grows)
    orepa.map_optimizer(optimizers[1], grows, expanded)
    train(stays, optimizers[0], 4)
    train(expanded, optimizers[1], 4)
    assert_same(output(expanded, batch()), output(stays, batch()), 1e-9)
    forgot = expand_silently(grows)
    train(forgot, make(forgot.parameters()), 4)
    error = (output(forgot, batch()) - output(stays, batch())).abs().max()
    assert error > 1e-3 * output(stays, batch()).abs().max()


def test_training_goes_on_alike_when_a_block_of_silent_branches_is_cut() -> None:
    make = OPTIMIZERS["SGD"]
    first = expand_silently(stem_net())
    optimizer = make(first.parameters())
    train(first, optimizer, 3)
    stays, less = orepa.expand(first, where="none*"), orepa.cut(first)
    twin = make(stays.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    orepa.map_optimizer(optimizer, first, less)
    train(stays, twin, 4)
    train(less, optimizer, 4)
    assert not any(isinstance(module, ConvBlock) for module in less.modules())
    assert_same(output(less, batch()), output(stays, batch()), 1e-9)


def velocity_of_the_kernel(
    model: nn.Module, optimizer: Optimizer, path: str, step: float = 1e-6
) -> Tensor:
    """(W(theta + h m) - W(theta - h m)) / 2 h over all parameters of the block at path."""
    block = model.get_submodule(path)
    found = []
    with torch.no_grad():
        for sign in (1, -1):
            moved = {
                n: p + sign * step * optimizer.state[p]["momentum_buffer"]
                for n, p in block.named_parameters()
            }
            kept = {n: p.clone() for n, p in block.named_parameters()}
            for name, p in block.named_parameters():
                p.copy_(moved[name])
            found.append(block.weight.clone())  # type: ignore[union-attr, operator]
            for name, p in block.named_parameters():
                p.copy_(kept[name])
    return (found[0] - found[1]) / (2 * step)


@pytest.fixture
def trained() -> tuple[nn.Module, Optimizer]:
    model = orepa.expand(stem_net())
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
    train(model, optimizer, 3)
    return model, optimizer


@pytest.mark.parametrize("path", ["conv", "stem", "depthwise", "pointwise"])
def test_a_cut_conv_moves_as_the_kernel_of_its_block_did(
    trained: tuple[nn.Module, Optimizer], path: str
) -> None:
    model, optimizer = trained
    expected = velocity_of_the_kernel(model, optimizer, path)
    less = orepa.cut(model, where=path)
    orepa.map_optimizer(optimizer, model, less)
    weight = less.get_parameter(f"{path}.weight")
    found = optimizer.state[weight]["momentum_buffer"]
    assert_same(found, expected, 1e-6)


@pytest.mark.parametrize("cut", [["average"], ["pointwise", "depthwise_pointwise"]])
def test_a_block_that_loses_branches_keeps_the_velocity_of_its_kernel(
    trained: tuple[nn.Module, Optimizer], cut: list[str]
) -> None:
    model, optimizer = trained
    expected = velocity_of_the_kernel(model, optimizer, "conv")
    rows = optimizer.state[model.get_parameter("conv.scaling")]["momentum_buffer"]
    less = orepa.cut(model, where="conv", branches=cut)
    orepa.map_optimizer(optimizer, model, less)
    assert_same(velocity_of_the_kernel(less, optimizer, "conv"), expected, 1e-6)
    scaling = optimizer.state[less.get_parameter("conv.scaling")]["momentum_buffer"]
    kept = [i for i, name in enumerate(OREPA.branches) if name not in cut]
    assert not scaling[0].any()
    assert torch.equal(scaling[1:], rows[kept[1:]])


def test_a_block_that_grows_keeps_the_velocity_of_its_kernel() -> None:
    names = ("origin", "average")
    small = replace(OREPA, name="small", branches={n: OREPA.branches[n] for n in names})
    model = orepa.expand(stem_net(), block=small, where="conv")
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
    train(model, optimizer, 3)
    expected = velocity_of_the_kernel(model, optimizer, "conv")
    grown = orepa.expand(model, block=OREPA, where="conv")
    orepa.map_optimizer(optimizer, model, grown)
    fresh = [n for n, p in grown.named_parameters() if not optimizer.state.get(p)]
    assert {name.split(".")[2] for name in fresh} == OREPA.branches.keys() - {*names}
    for name in fresh:
        p = grown.get_parameter(name)
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    assert_same(velocity_of_the_kernel(grown, optimizer, "conv"), expected, 1e-6)


def test_learning_rates_of_groups_weigh_the_velocities() -> None:
    model = orepa.expand(stem_net(), where="conv")
    block = model.get_submodule("conv")
    assert isinstance(block, ConvBlock)
    slow = [block.scaling]
    fast = [p for p in model.parameters() if p is not block.scaling]
    groups = [{"params": fast, "lr": 0.02}, {"params": slow, "lr": 0.005}]
    optimizer = SGD(groups, lr=1.0, momentum=0.9)
    train(model, optimizer, 2)
    assert block.scaling is not None
    state = optimizer.state[block.scaling]
    whole = velocity_of_the_kernel(model, optimizer, "conv")
    state["momentum_buffer"].mul_(0.25)
    expected = velocity_of_the_kernel(model, optimizer, "conv")
    state["momentum_buffer"].mul_(4.0)
    assert (whole - expected).abs().max() > 1e-3 * expected.abs().max()
    less = orepa.cut(model)
    orepa.map_optimizer(optimizer, model, less)
    found = optimizer.state[less.get_parameter("conv.weight")]["momentum_buffer"]
    assert_same(found, expected, 1e-6)
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        len(list(less.parameters())),
        0,
    ]


@pytest.mark.parametrize(
    "make", [lambda p: Adam(p, lr=1e-3), lambda p: RMSprop(p, lr=1e-3, momentum=0.9)]
)
def test_other_optimizers_start_the_kernel_of_a_cut_block_anew_and_keep_the_rest(
    make: Callable[[Any], Optimizer],
) -> None:
    model = orepa.expand(stem_net(), where="conv")
    optimizer = make(model.parameters())
    train(model, optimizer, 2)
    kept = dict(optimizer.state[model.get_parameter("stem.weight")])
    less = orepa.cut(model)
    orepa.map_optimizer(optimizer, model, less)
    assert less.get_parameter("conv.weight") not in optimizer.state
    assert optimizer.state[less.get_parameter("stem.weight")] == kept
    train(less, optimizer, 1)
    assert optimizer.state[less.get_parameter("conv.weight")]["step"] == 1
    assert optimizer.state[less.get_parameter("stem.weight")]["step"] == 3


def grouped(model: nn.Module, extra: nn.Parameter) -> SGD:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    first = {"params": [extra, *decayed], "weight_decay": 1e-4, "lr": 0.1}
    return SGD([first, {"params": plain, "weight_decay": 0.0}], lr=0.01, momentum=0.9)


def test_groups_keep_their_options_and_new_parameters_join_their_neighbours() -> None:
    model, extra = bare_net(), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = grouped(model, extra)
    optimizer.state[extra] = {"momentum_buffer": torch.ones(2)}
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    bias = model.get_parameter("conv1.bias")
    optimizer.state[bias] = {"momentum_buffer": torch.full_like(bias, 3.0)}
    grown = orepa.expand(model, block=OREPA, where="conv1")
    orepa.map_optimizer(optimizer, model, grown)
    first, second = optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (1e-4, 0.0)
    homes = {n: [any(p is q for q in g["params"]) for g in (first, second)]
             for n, p in grown.named_parameters()}  # fmt: skip
    assert homes.pop("conv1.norm.weight") == [False, True]
    assert homes.pop("conv1.norm.bias") == [False, True]
    assert homes.pop("conv2.bias") == [False, True]
    assert all(home == [True, False] for home in homes.values())
    assert first["params"][-1] is extra
    assert optimizer.state[extra]["momentum_buffer"].sum() == 2
    moved = optimizer.state[grown.get_parameter("conv1.norm.bias")]["momentum_buffer"]
    assert moved[0] == 3
    for p in grown.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005]


def test_named_optimizers_keep_names() -> None:
    model = stem_net()
    optimizer = SGD(model.named_parameters(), lr=0.1)
    grown = orepa.expand(model, where="conv")
    orepa.map_optimizer(optimizer, model, grown)
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in grown.named_parameters()]


def test_what_was_not_trained_is_not_trained() -> None:
    model = stem_net()
    optimizer = SGD([p for n, p in model.named_parameters() if n != "conv.weight"], lr=0.1)
    grown = orepa.expand(model)
    orepa.map_optimizer(optimizer, model, grown)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    left = {n.partition(".")[0] for n, p in grown.named_parameters() if id(p) not in held}
    assert left == {"conv"}


def test_linearized_sums_start_anew_in_the_group_of_their_branches() -> None:
    model = branch_net()
    optimizer = SGD([{"params": b.parameters(), "lr": 0.1 / i} for i, b in enumerate(model, 1)],
                    lr=0.1, momentum=0.9)  # fmt: skip
    train(model, optimizer, 1)
    expanded = orepa.expand(model, block=OREPA)
    orepa.map_optimizer(optimizer, model, expanded)
    assert not optimizer.state
    for block, group in zip(expanded, optimizer.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in block.parameters()]


def test_linearized_blocks_start_anew() -> None:
    offline = replace(OREPA, name="offline", scaling_layer="norm")
    model = orepa.expand(stem_net(), block=offline, where="conv")
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    small = orepa.expand(model, block=OREPA, where="conv")
    larger = replace(OREPA, branches={**OREPA.branches, "again": OREPA.branches["average"]})
    grown = orepa.expand(model, block=larger, where="conv")
    for net in (small, grown):
        twin = copy.deepcopy((model, optimizer))
        orepa.map_optimizer(twin[1], twin[0], net)
        remembered = {n.partition(".")[0] for n, p in net.named_parameters() if p in twin[1].state}
        assert remembered == {n for n, _ in stem_net().named_children()} - {"conv", "relu"}


def test_an_optimizer_of_another_model_is_an_error_and_stays_as_it_was() -> None:
    model, other = stem_net(), stem_net()
    optimizer = SGD(other.parameters(), lr=0.1)
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(ReparamError) as caught:
        orepa.map_optimizer(optimizer, model, orepa.expand(model))
    assert str(caught.value) == (
        "the SGD holds no parameter of the first model; give the model that it was made with, "
        "then the rewritten one"
    )
    with pytest.raises(ReparamError) as caught:
        orepa.map_optimizer(optimizer, other, other)
    assert str(caught.value) == ("before and after are one model; rewrite a copy (inplace=False)")
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before
