"""Real models as engines, for a GPU that need not be there: what TensorRT's network holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from orepa_compiler import collapse
from orepa_compiler.export import build_engine, export_onnx, inspect_network
from orepa_compiler.model_source import load_model

pytest.importorskip("tensorrt_rtx")

pytestmark = pytest.mark.usefixtures("no_gpu")

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))

# Model -> its convs, and the sums of feature maps that are left.
MODELS = {
    "torchvision:resnet18": (20, 8),
    "torchvision:mobilenet_v3_small": (52, 6),
    "torchvision:deeplabv3_mobilenet_v3_large": (70, 10),
    "timm:repvgg_a0": (22, 0),
    "torchvision:efficientnet_b0": (81, 9),
}

# Precision -> the type that TensorRT's convs read.
DTYPES = {"fp32": "FLOAT", "fp16": "HALF", "int8": "FLOAT"}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    if "deeplab" in request.param:
        name = request.param.partition(":")[2]
        net = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    else:
        net = load_model(request.param)
    return request.param, collapse(net)


@pytest.mark.parametrize("precision", list(DTYPES))
def test_a_model_is_built_in_each_precision(
    model: tuple[str, nn.Module], precision: str, tmp_path: Path
) -> None:
    name, net = model
    source = export_onnx(
        net,
        IMAGES,
        tmp_path / "net.onnx",
        dynamic_batch=False,  # traced in half the time; other tests build for a symbolic batch
        precision=precision,
        calibration=[IMAGES] if precision == "int8" else None,
    )
    summary = inspect_network(source)
    convs, adds = MODELS[name]
    assert (summary.convs, summary.adds, summary.norms) == (convs, adds, 0)
    assert summary.dtypes == ((DTYPES[precision], convs),)
    assert summary.quantized == (convs if precision == "int8" else 0)
    engine = build_engine(source, tmp_path / "net.engine")
    assert engine.stat().st_size > 10_000


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:mobilenet_v3_small"])
def test_a_model_is_built_in_bfloat16(name: str, tmp_path: Path) -> None:
    net = collapse(load_model(name))
    source = export_onnx(net, IMAGES, tmp_path / "net.onnx", precision="bf16", dynamic_batch=False)
    assert inspect_network(source).dtypes == (("BF16", MODELS[name][0]),)
    assert build_engine(source, tmp_path / "net.engine").stat().st_size > 10_000
