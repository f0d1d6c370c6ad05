"""The tools that people train with, on an expanded model: what they give is what they promise."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint_sequential

import orepa_compiler as orepa
from orepa_compiler.blocks import ReparamConv
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import recorded_plans
from tests.convolution_reference import assert_same
from tests.operator_factories import random_tensor
from tests.training_nets import expanded_net, loss, optimizer_of, stock_net


@pytest.fixture
def net() -> nn.Sequential:
    model = expanded_net()
    assert isinstance(model, nn.Sequential)
    return model


@pytest.fixture
def x() -> Tensor:
    return random_tensor(4, 3, 12, 12)


def train(model: nn.Module, steps: int = 3, **options: Any) -> nn.Module:
    """A few steps of SGD on random images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, random_tensor(4, 3, 12, 12, seed=step)).backward()
        optimizer.step()
    return model


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).detach().norm() / expected.detach().norm())


def assert_collapses(model: nn.Module, x: Tensor) -> None:
    assert orepa.verify(model, orepa.collapse(model), x)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_kernels_in_float32(
    net: nn.Sequential, x: Tensor, dtype: torch.dtype, once: bool
) -> None:
    """Loss and gradients are as near to float64 as those of the plain net under autocast."""
    plain = orepa.collapse(net, fold_norm=False).train()
    errors = []
    for model in (plain, net):
        exact = loss(model, x)
        exact.backward()
        expected = gradients(model)
        half = copy.deepcopy(model).float()
        half.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(half.parameters(), lr=0.0)
        with orepa.kernels_once(half) if once and model is net else torch.enable_grad():
            with torch.autocast("cpu", dtype=dtype):
                value = loss(half, x.float())
            scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in half.parameters())
        errors.append((relative(value, exact), relative(gradients(half), expected)))
    for plain_error, own_error in zip(*errors, strict=True):
        assert 0 < own_error < 2 * plain_error + torch.finfo(dtype).eps


def test_a_grad_scaler_skips_a_step_that_overflowed(net: nn.Sequential, x: Tensor) -> None:
    net.float()
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    with orepa.kernels_once(net):
        scaler.scale(1e6 * loss(net, x.float())).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**120
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("once", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(
    net: nn.Sequential, x: Tensor, once: bool
) -> None:
    twin = copy.deepcopy(net)
    loss(twin, x).backward()
    with orepa.kernels_once(net) if once else torch.enable_grad():
        (checkpoint_sequential(net, 3, x, use_reentrant=False) - 1).square().mean().backward()
    assert_same(gradients(net), gradients(twin))


def test_moving_averages_of_branches(net: nn.Sequential, x: Tensor) -> None:
    """What is averaged is parameters; the average is a model in training form as any other."""
    averages: list[Any] = [
        AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        ModelEmaV3(net, decay=0.5),
    ]
    expected = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        train(net, 1)
        expected = [(a + p.detach()) / 2 for a, p in zip(expected, net.parameters(), strict=True)]
        averages[0].update_parameters(net)
        averages[1].update(net)
    for average in averages[1:]:
        for found, wanted in zip(average.module.parameters(), expected, strict=True):
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-15)
    for average in averages:
        assert_collapses(average.module, x)


def test_stochastic_weight_averaging(net: nn.Sequential, x: Tensor) -> None:
    average = AveragedModel(net)
    seen = []
    for _ in range(2):
        seen.append([p.detach().clone() for p in train(net, 1).parameters()])
        average.update_parameters(net)
    for found, *two in zip(average.module.parameters(), *seen, strict=True):
        torch.testing.assert_close(found.detach(), sum(two) / 2)
    update_bn([x, x + 1], average)
    mean = average.module[0](torch.cat([x, x + 1])).mean((0, 2, 3))  # type: ignore[index]
    torch.testing.assert_close(average.module[1].running_mean, mean)  # type: ignore[index]
    assert_collapses(average.module, x)


def test_copies_and_files_of_a_model_in_training(net: nn.Sequential, x: Tensor) -> None:
    train(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    twin, read = copy.deepcopy(net), torch.load(file, weights_only=False)
    file.seek(0)
    file.truncate()
    torch.save(net.state_dict(), file)
    file.seek(0)
    loaded = orepa.expand(stock_net())
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (twin, read, loaded):
        assert recorded_plans(other)
        assert_trains_on_like(net, other, x)


def assert_trains_on_like(net: nn.Module, other: nn.Module, x: Tensor) -> None:
    values = []
    for model in (copy.deepcopy(net), other):
        model.zero_grad()
        values.append(loss(train(model.train()), x))
    assert torch.equal(*values)


def test_clipping_by_the_size_of_parameters(net: nn.Sequential, x: Tensor) -> None:
    """Adaptive clipping reads both a parameter and its gradient."""
    loss(net, x).backward()
    dispatch_clip_grad(net.parameters(), 0.01, mode="agc")
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        if parameter.dim() > 1:
            units = [t.flatten(1).norm(dim=1) for t in (parameter.grad, parameter.detach())]
            assert bool((units[0] <= 0.01 * units[1].clamp(min=1e-3) * (1 + 1e-6)).all()), name


def test_a_frozen_branch_stays(net: nn.Sequential) -> None:
    block = net[3]
    frozen = dict(block.branches.pointwise_kernel.named_parameters())  # type: ignore[union-attr]
    before = {name: p.detach().clone() for name, p in frozen.items()}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    twin = copy.deepcopy(net).requires_grad_(True)
    train(net, 1, weight_decay=0.1)
    train(twin, 1, weight_decay=0.1)
    for name, parameter in frozen.items():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    origin = "branches.origin.weight"
    assert torch.equal(block.get_parameter(origin), twin[3].get_parameter(origin))  # type: ignore[index]


def test_a_frozen_backbone_and_a_new_head(net: nn.Sequential, x: Tensor) -> None:
    """Transfer learning: only the new head trains, as it would behind the plain net."""
    net[:-1].requires_grad_(False).eval()
    torch.manual_seed(3)
    net[-1] = nn.Linear(144, 2).double()
    plain = orepa.collapse(net)
    for model in (net, plain):
        train(model, 2)
    assert all(p.grad is None for p in net[:-1].parameters())
    torch.testing.assert_close(net[-1].weight, plain.get_submodule("9").weight)
    assert_collapses(net, x)


def test_a_new_classifier_of_a_timm_model(tmp_path: Any) -> None:
    model = orepa.expand(timm.create_model("test_resnet"))
    model.reset_classifier(3)  # type: ignore[operator]
    path = orepa.save(model, tmp_path / "new.safetensors")
    loaded = orepa.load(lambda: timm.create_model("test_resnet", num_classes=3), path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    stock = timm.create_model("test_resnet", num_classes=3)
    stock.load_state_dict(orepa.collapse(model, fold_norm=False).state_dict(), strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casting_a_model(net: nn.Sequential, x: Tensor, dtype: torch.dtype) -> None:
    """A cast block is as near as the plain net cast the same way, up to the rounding of W_e."""
    plain = orepa.collapse(net, fold_norm=False).train()
    expected, errors = net(x), []
    for model in (plain, net):
        found = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        errors.append(relative(found, expected))
    assert 0 < errors[1] < 4 * errors[0]


def test_hooks_that_are_added_after_expand(net: nn.Sequential, x: Tensor) -> None:
    calls: list[str] = []
    net[3].register_forward_hook(lambda *_: calls.append("forward"))
    net[3].register_full_backward_hook(lambda *_: calls.append("backward"))
    net[3].branches.origin.weight.register_hook(lambda grad: calls.append("branch"))  # type: ignore[union-attr]
    loss(net, x).backward()
    assert sorted(calls) == ["backward", "branch", "forward"]
    reasons = {r.path: r.reason for r in recorded_plans(orepa.collapse(net))[-1].refusals}
    assert reasons["3"].startswith("it has a hook")


def test_two_optimizers(net: nn.Sequential, x: Tensor) -> None:
    """Scaling layers with one, all else with another: the same as one with two groups."""
    nets, scalings = [net, copy.deepcopy(net)], []
    for model in nets:
        scaling = [p for n, p in model.named_parameters() if n.endswith("scaling")]
        own = {id(p) for p in scaling}
        scalings.append((scaling, [p for p in model.parameters() if id(p) not in own]))
    two = [torch.optim.SGD(scalings[0][0], lr=0.01), torch.optim.SGD(scalings[0][1], lr=0.1)]
    groups = [{"params": p, "lr": lr} for p, lr in zip(scalings[1], (0.01, 0.1), strict=True)]
    for model, optimizers in zip(nets, (two, [torch.optim.SGD(groups)]), strict=True):
        for _ in range(2):
            model.zero_grad()
            loss(model, x).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert torch.equal(*(loss(model, x) for model in nets))


def test_a_learning_rate_sweep_leaves_no_trace(net: nn.Sequential, x: Tensor) -> None:
    """What a learning rate finder does: train away, then put the weights back."""
    expected = net.eval()(x)
    with torch.no_grad():
        net(x)
    saved = copy.deepcopy(net.state_dict())
    train(net.train(), 4)
    assert not torch.equal(net.eval()(x), expected)
    net.load_state_dict(saved)
    with torch.no_grad():
        assert_same(net.eval()(x), expected)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **o: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, **o),
    "AdamW": lambda p, **o: torch.optim.AdamW(p, lr=0.01, eps=1e-3, **o),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_and_foreach_optimizers(net: nn.Sequential, x: Tensor, name: str) -> None:
    nets = [copy.deepcopy(net) for _ in range(3)]
    for model, how in zip(
        nets, ({"foreach": False}, {"foreach": True}, {"fused": True}), strict=True
    ):
        optimizer = OPTIMIZERS[name](model.parameters(), **how)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.no_grad():
                model.eval()(x)  # keeps a kernel, which the step makes old
            loss(model.train(), x).backward()
            optimizer.step()
    for ours in nets[1:]:
        for found, expected in zip(ours.parameters(), nets[0].parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_scripting_says_what_to_do_instead(net: nn.Sequential) -> None:
    with (
        pytest.warns(DeprecationWarning, match="torch.jit.script"),
        pytest.raises(ReparamError) as error,
    ):
        torch.jit.script(net)
    assert str(error.value) == (
        "torch.jit.script cannot read a model in training form; script orepa.collapse(model)"
    )
    assert isinstance(net[0], ReparamConv)


def test_gradients_may_be_zeros_or_none(net: nn.Sequential, x: Tensor) -> None:
    """zero_grad(set_to_none=False), as old loops have it."""
    twin = copy.deepcopy(net)
    for model, to_none in ((net, True), (twin, False)):
        optimizer = optimizer_of(model)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=to_none)
            with orepa.kernels_once(model):
                loss(model, x).backward()
            optimizer.step()
    assert torch.equal(loss(net, x), loss(twin, x))
