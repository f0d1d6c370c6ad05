"""Real models, end to end: expand keeps the function, a step of SGD, collapse keeps it again.

The counts are asserted, so that a match that is lost, or a norm that stays behind, is seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm, is_conv_like
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import capture
from orepa_compiler.passes import Collapse, is_leaf
from orepa_compiler.planning import recorded_plans
from tests.norms import randomise_norms

pytestmark = pytest.mark.zoo

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Model:
    """convs: how many. expanded: how many of them. norms: left, where no conv stands before."""

    build: Callable[[], nn.Module]
    convs: int
    expanded: int
    norms: int = 0
    size: tuple[int, ...] = (64, 64)


def vision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)()


def timm_model(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


def googlenet() -> nn.Module:
    return torchvision.models.googlenet(init_weights=False)


def deeplab() -> nn.Module:
    segmentation = torchvision.models.segmentation
    return segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)


def r3d() -> nn.Module:
    return torchvision.models.video.r3d_18()


MODELS = {
    "resnet18": Model(vision("resnet18"), 20, 20),
    "resnet50": Model(vision("resnet50"), 53, 53),
    "mobilenet_v2": Model(vision("mobilenet_v2"), 52, 52),
    "mobilenet_v3_small": Model(vision("mobilenet_v3_small"), 52, 34),
    "vgg11_bn": Model(vision("vgg11_bn"), 8, 8),
    "vgg11": Model(vision("vgg11"), 8, 8),
    "densenet121": Model(vision("densenet121"), 120, 120, norms=62),
    "googlenet": Model(googlenet, 59, 59),
    "shufflenet_v2_x1_0": Model(vision("shufflenet_v2_x1_0"), 56, 56),
    "convnext_tiny": Model(vision("convnext_tiny"), 22, 18),
    "efficientnet_b0": Model(vision("efficientnet_b0"), 81, 49),
    "deeplabv3_mobilenet_v3_large": Model(deeplab, 70, 52),
    "r3d_18": Model(r3d, 20, 20, size=(4, 32, 32)),
    "timm repvgg_a0": Model(timm_model("repvgg_a0"), 44, 44),
    "timm mobileone_s0": Model(timm_model("mobileone_s0"), 191, 191),
    "timm efficientnet_b0": Model(timm_model("efficientnet_b0"), 81, 49),
}

# After collapse parallel branches are one conv, so these have fewer convs than they began with.
COLLAPSED_CONVS = {"timm repvgg_a0": 22, "timm mobileone_s0": 43}


def main_output(output: object) -> Tensor:
    """The first tensor of a model's output: logits, the first of a tuple, or the map "out"."""
    if isinstance(output, Tensor):
        return output
    return output["out"] if isinstance(output, dict) else output[0]  # type: ignore[index]


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def stock(model: Model, dtype: torch.dtype) -> nn.Module:
    with warnings.catch_warnings():  # torchvision's own advice about initialisation
        warnings.simplefilter("ignore")
        return model.build().to(dtype)


def step(model: nn.Module, x: Tensor) -> None:
    """One step of SGD in train mode, small enough that the net stays in its range."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    main_output(model(x)).square().mean().backward()
    optimizer.step()
    model.eval()


def count(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> int:
    return sum(wanted(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]
    original = randomise_norms(stock(model, dtype)).eval()
    x = torch.randn(2, 3, *model.size, dtype=dtype)
    with torch.no_grad():
        expected = main_output(original(x))

    expanded = orepa.expand(original).eval()
    assert count(original, is_conv_like) == model.convs
    assert count(expanded, lambda m: isinstance(m, ConvBlock)) == model.expanded
    assert len(recorded_plans(expanded)[-1].refusals) == model.convs - model.expanded
    with torch.no_grad():
        assert error(main_output(expanded(x)), expected) <= TOLERANCE[dtype]

    step(expanded, x)
    with torch.no_grad():
        trained = main_output(expanded(x))
    assert error(trained, expected) > 100 * TOLERANCE[dtype], "the step must have changed it"

    deploy = orepa.collapse(expanded)
    assert count(deploy, is_conv_like) == COLLAPSED_CONVS.get(name, model.convs)
    assert count(deploy, is_batch_norm) == model.norms
    again = Collapse().plan(capture(deploy, training=False, is_leaf=is_leaf))
    assert not again.edits
    kept = [r for r in again.refusals if not r.layer.startswith("Conv")]
    assert all(refusal.reason.startswith("no conv alone feeds it") for refusal in kept)
    with torch.no_grad():
        assert error(main_output(deploy(x)), trained) <= TOLERANCE[dtype]

    kept = orepa.collapse(expanded, fold_norm=False)
    fresh = stock(model, dtype).eval()
    fresh.load_state_dict(kept.state_dict(), strict=True)
    with torch.no_grad():
        assert error(main_output(fresh(x)), trained) <= TOLERANCE[dtype]
