"""Files exported once for all tests here, and a torch that sees no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from orepa_compiler.export import export_onnx
from tests.export.nets import DictNet, SmallNet, folded_resnet18, images


@pytest.fixture(scope="session")
def net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet().eval()


@pytest.fixture(scope="session")
def exported(net: SmallNet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small net's ONNX file for each precision, and one with several named outputs."""
    folder = tmp_path_factory.mktemp("exported")
    files = {
        precision: export_onnx(net, images(), folder / f"{precision}.onnx", precision=precision)
        for precision in ("fp32", "fp16", "bf16")
    }
    files["dict"] = export_onnx(DictNet().eval(), images(), folder / "dict.onnx")
    return files


@pytest.fixture(scope="session")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return folded_resnet18()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
