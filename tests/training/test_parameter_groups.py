"""Parameter groups: each parameter in one, norms and scaling layers without decay."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.errors import ReparamError


class Net(nn.Module):
    """A deep stem, a grouped conv, a 1 x 1, a LayerNorm over maps, a token, and a head."""

    def __init__(self) -> None:
        super().__init__()
        stem = (nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        body = (nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8))
        self.features = nn.Sequential(*stem, *body, nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
        self.norm = nn.LayerNorm((4, 6, 6))
        self.token = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.head = nn.Linear(4 * 36, 5)

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head((self.norm(x + x.relu()) + self.token).flatten(1))


@pytest.fixture
def net() -> nn.Module:
    return orepa.expand(Net())


def names_in(model: nn.Module, group: dict[str, Any]) -> set[str]:
    own = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    return {group["name"]: names_in(model, group) for group in groups}


def assert_each_once(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    found = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(found) == sorted(wanted)


def test_recommended_groups(net: nn.Module) -> None:
    groups = orepa.param_groups(net, weight_decay=0.05)
    assert_each_once(net, groups)
    assert {g["name"]: g["weight_decay"] for g in groups} == {"decay": 0.05, "no_decay": 0.0}
    assert all("lr" not in group for group in groups)
    found = by_name(net, groups)
    kernels = {n for n in dict(net.named_parameters()) if ".branches." in n and "scaling" not in n}
    assert len(kernels) > 20
    assert found["decay"] == kernels | {"head.weight"}
    stem = "features.0.branches.deep_stem.stack.1.scaling"
    assert {stem, "features.0.scaling", "norm.weight", "token"} < found["no_decay"]


def test_reference_groups(net: nn.Module) -> None:
    groups = orepa.param_groups(net, weight_decay=1e-4, lr=0.1, preset="reference")
    assert_each_once(net, groups)
    assert {g["name"]: (g["weight_decay"], g["lr"]) for g in groups} == {
        "decay": (1e-4, 0.1),
        "norm": (0.0, 0.1),
        "bias": (0.0, 0.2),
    }
    found = by_name(net, groups)
    assert found["bias"] == {n for n in dict(net.named_parameters()) if n.endswith("bias")}
    norms = {f"features.{index}.weight" for index in (1, 4, 6)}
    assert found["norm"] == {*norms, "norm.weight"}
    assert {"features.0.scaling", "features.3.scaling", "token"} < found["decay"]


def test_a_stem_learns_slower(net: nn.Module) -> None:
    groups = orepa.param_groups(net, lr=0.02, stem_divisor=10.0)
    assert_each_once(net, groups)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == pytest.approx(
        {"decay": 0.02, "no_decay": 0.02, "stem_decay": 0.002, "stem_no_decay": 0.002}
    )
    found = by_name(net, groups)
    stem = {n for n in dict(net.named_parameters()) if n.startswith("features.0.")}
    assert found["stem_decay"] | found["stem_no_decay"] == stem


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lamb"])
def test_optimizers_take_the_groups(net: nn.Module, kind: str) -> None:
    groups = orepa.param_groups(net, weight_decay=0.1, lr=0.5, preset="reference")
    if kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=9.0, momentum=0.9)
    else:
        optimizer = create_optimizer_v2(groups, opt=kind, lr=9.0, weight_decay=9.0)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (g["lr"], g["weight_decay"]) for g in groups
    ]
    net(torch.randn(2, 3, 12, 12)).sum().backward()
    optimizer.step()
    again = type(optimizer)(orepa.param_groups(net, lr=0.5, preset="reference"))
    again.load_state_dict(optimizer.state_dict())
    assert [g["name"] for g in again.param_groups] == [g["name"] for g in groups]


def test_decay_reaches_what_decays_and_nothing_else(net: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = orepa.param_groups(net, weight_decay=0.1)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(groups, lr=1.0).step()
    decayed = names_in(net, groups[[g["name"] for g in groups].index("decay")])
    for name, parameter in net.named_parameters():
        factor = 0.9 if name in decayed else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)


def test_timm_groups_the_same_but_for_scaling_layers() -> None:
    """What timm.create_optimizer_v2 makes of an expanded model: it decays the scaling layers."""
    model = orepa.expand(timm.create_model("test_resnet"))
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1)
    assert_each_once(model, optimizer.param_groups)
    theirs = {n for g in optimizer.param_groups if g["weight_decay"] for n in names_in(model, g)}
    ours = by_name(model, orepa.param_groups(model))["decay"]
    assert theirs - ours == {n for n, _ in model.named_parameters() if n.endswith("scaling")}
    assert not ours - theirs


def test_frozen_and_shared_parameters(net: nn.Module) -> None:
    frozen = next(module for module in net.modules() if isinstance(module, ConvBlock))
    frozen.requires_grad_(False)
    net.register_module("again", net.get_submodule("head"))
    assert_each_once(net, orepa.param_groups(net))
    wrapped = nn.Sequential(net)  # as a wrapper with a prefix does
    assert {"0.token"} < by_name(wrapped, orepa.param_groups(wrapped))["no_decay"]


def test_a_vector_of_any_name_does_not_decay(net: nn.Module) -> None:
    net.register_parameter("gamma", nn.Parameter(torch.ones(3)))  # layer scale
    assert "gamma" in by_name(net, orepa.param_groups(net))["no_decay"]


def test_a_parameter_that_two_modules_share_is_in_one_group(net: nn.Module) -> None:
    head = net.get_submodule("head")
    assert isinstance(head, nn.Linear)
    tied = nn.Linear(head.in_features, head.out_features)
    tied.weight = head.weight
    net.add_module("tied", tied)
    assert_each_once(net, orepa.param_groups(net))


def message(model: Any, **options: Any) -> str:
    with pytest.raises(ReparamError) as error:
        orepa.param_groups(model, **options)
    return str(error.value)


def test_errors(net: nn.Module) -> None:
    assert message(3) == "the model is a int, not a torch.nn.Module"
    assert message(net, preset="timm") == "preset='timm' is neither 'recommended' nor 'reference'"
    assert message(net, weight_decay=-1.0) == "weight_decay=-1.0; give 0 or more"
    assert message(net, weight_decay=float("nan")) == "weight_decay=nan; give 0 or more"
    assert message(net, lr=0.0) == "lr=0.0; give more than 0"
    assert message(net, stem_divisor=0.0) == ("stem_divisor=0.0; give more than 0, 10 for a tenth")
    rates = "these groups differ in their learning rate; give the base one, lr=..."
    assert message(net, stem_divisor=10.0) == rates
    assert message(net, preset="reference") == rates
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert message(plain, stem_divisor=10.0, lr=0.1) == (
        "stem_divisor=10.0 and Sequential has no deep stem; leave it out"
    )
    assert message(net.requires_grad_(False)) == (
        "Net has no parameter with requires_grad=True; nothing is left to train"
    )
    flat = nn.Sequential(type("FullyShardedDataParallel", (nn.Linear,), {})(2, 2))
    assert message(flat) == (
        "0: FullyShardedDataParallel flattens parameters, so kernels cannot be told from norms; "
        "shard with torch.distributed.fsdp.fully_shard"
    )
