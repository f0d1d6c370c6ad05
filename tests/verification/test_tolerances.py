"""Real models: right pairs are never failed, and injected faults never pass."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn

from orepa_compiler.verification import verify_callables
from tests.norms import randomise_norms
from tests.verification_nets import fuse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "densenet121": torchvision.models.densenet121,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "test_resnet": lambda: timm.create_model("test_resnet"),
    "test_efficientnet": lambda: timm.create_model("test_efficientnet"),
    "test_byobnet": lambda: timm.create_model("test_byobnet", num_classes=10),
    "test_convnext": lambda: timm.create_model("test_convnext"),
}


@cache
def trained(name: str) -> tuple[nn.Module, Tensor]:
    """A model with random norms, and inputs for it."""
    torch.manual_seed(0)
    return randomise_norms(MODELS[name]().eval()), torch.randn(2, 3, 64, 64)


@cache
def fused(name: str) -> fx.GraphModule:
    """The same with its norms folded by torch, in float64."""
    return fuse(deepcopy(trained(name)[0]).double())


PAIRS = [(name, precision) for name in MODELS for precision in ("fp32", "bf16")] + [
    (name, "fp16") for name in ("test_resnet", "test_efficientnet", "test_byobnet")
]


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_folded_norms_agree(name: str, precision: str) -> None:
    model, x = trained(name)
    report = verify_callables(
        model, deepcopy(fused(name)).to(DTYPES[precision]), x, precision=precision
    )
    assert report, str(report)
    assert all(row.tolerance < 0.1 for row in report.rows)


@pytest.mark.parametrize("name", ["resnet18", "test_resnet", "test_convnext"])
def test_another_memory_format_agrees(name: str) -> None:
    model, x = trained(name)
    other = deepcopy(model).to(memory_format=torch.channels_last)
    assert verify_callables(model, other, x)
    assert verify_callables(
        model, fuse(deepcopy(model)).to(memory_format=torch.channels_last), [x, x[:1]]
    )


def without_bias(conv: nn.Conv2d) -> None:
    conv.bias = None


def circular(conv: nn.Conv2d) -> None:
    conv.padding_mode = "circular"


def weight_off(conv: nn.Conv2d) -> None:
    conv.weight[3, 0, 1, 1] *= 1.1


def mirrored(conv: nn.Conv2d) -> None:
    conv.weight.copy_(conv.weight.flip(-1))


def channel_lost(conv: nn.Conv2d) -> None:
    conv.weight[1] = 0


def sign_of_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    conv.bias.neg_()


def rounded(conv: nn.Conv2d) -> None:
    conv.weight.copy_(conv.weight.bfloat16())


SPOIL = (without_bias, sign_of_bias, circular, weight_off, mirrored, channel_lost, rounded)


@pytest.mark.parametrize("place", [0, 1, 4, 9])
@pytest.mark.parametrize("spoil", SPOIL)
@torch.no_grad()
def test_a_fault_in_one_kernel_is_caught(spoil: Callable[[nn.Conv2d], None], place: int) -> None:
    model, x = trained("test_resnet")
    wrong = deepcopy(fused("test_resnet"))
    spoil(convs_of(wrong)[place])
    right = deepcopy(model).double()(x.double())
    effect = float((wrong(x.double()) - right).abs().max() / right.abs().max())
    row = verify_callables(model, wrong.float(), x).rows[0]
    assert effect > 1.5 * row.tolerance, "this fault cannot be seen: choose another"
    assert "is above the tolerance" in row.reason
    assert row.error == pytest.approx(effect, rel=0.1)


def convs_of(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("place", [0, 5, 10, 19])
def test_a_wrong_eps_is_caught(place: int) -> None:
    model, x = trained("resnet18")
    other = deepcopy(model)
    norms = [module for module in other.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[place].eps = 1e-3
    assert not verify_callables(model, fuse(other), x)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("place", [0, 6, 14])
@torch.no_grad()
def test_a_lost_bias_is_caught_in_half_precision(place: int, precision: str) -> None:
    model, x = trained("test_resnet")
    wrong = deepcopy(fused("test_resnet"))
    convs_of(wrong)[place].bias = None
    assert not verify_callables(model, wrong.to(DTYPES[precision]), x, precision=precision)
