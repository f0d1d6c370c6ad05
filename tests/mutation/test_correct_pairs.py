"""No right candidate fails: real models, collapsed, in float32, float16 and bfloat16.

Every pair is compared on normal inputs and on random, constant, large and small ones.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.model_source import load_model
from orepa_compiler.proving.certifying import certify
from orepa_compiler.proving.locating import locate
from tests.norms import randomise_norms

MODELS = (
    "timm:test_byobnet",
    "timm:test_convnext",
    "timm:test_efficientnet",
    "timm:test_efficientnet_gn",
    "timm:test_mambaout",
    "timm:test_nfnet",
    "timm:test_resnet",
    "timm:lcnet_035",
    "timm:mobilenetv3_small_050",
    "timm:mobilenetv4_conv_small_035",
    "timm:ghostnet_050",
    "timm:tinynet_e",
    "torchvision:mobilenet_v3_small",
    "torchvision:mnasnet0_5",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
)

# Expanding these takes a moment only.
QUICK = tuple(name for name in MODELS if ":test_" in name)

pytestmark = pytest.mark.zoo


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@cache
def trained(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(load_model(name)).eval()


@cache
def deployed(name: str) -> nn.Module:
    return orepa.collapse(trained(name))


@pytest.mark.parametrize("name", MODELS)
def test_the_collapsed_model_passes(name: str) -> None:
    report = orepa.verify(trained(name), deployed(name), images(), stress=True)
    assert report, report
    assert {row.made for row in report.rows} == {"", "random", "constant", "large", "small"}
    assert locate(trained(name), deployed(name), images()) is None


@pytest.mark.parametrize("name", QUICK)
def test_the_expanded_model_collapses_to_one_that_passes(name: str) -> None:
    expanded = randomise_norms(orepa.expand(trained(name))).eval()
    deploy = orepa.collapse(expanded)
    report = orepa.verify(expanded, deploy, images(), stress=True)
    assert report, report
    certificate = certify(expanded, deploy, images())
    assert certificate or not certificate.blocks, certificate


@pytest.mark.parametrize("name", MODELS[-5:])
def test_another_memory_format_passes(name: str) -> None:
    deploy = orepa.collapse(trained(name)).to(memory_format=torch.channels_last)
    pixels = images().contiguous(memory_format=torch.channels_last)
    report = orepa.verify(trained(name), deploy, pixels, stress=True)
    assert report, report


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_collapsed_model_in_half_precision_passes(name: str, precision: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    deploy = orepa.collapse(trained(name)).to(dtype)
    report = orepa.verify(trained(name), deploy, images(), precision=precision, stress=True)
    assert report, report
    assert any(row.made == "" for row in report.rows)
