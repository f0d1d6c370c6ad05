"""Models, functions and files on either side of a comparison."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.cli import main
from orepa_compiler.errors import ReparamError
from orepa_compiler.export import OnnxRunner
from tests.export.nets import SmallNet, images
from tests.norms import randomise_norms


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return orepa.collapse(randomise_norms(SmallNet()).eval())


@pytest.fixture(scope="module")
def file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return orepa.export_onnx(net, images(), tmp_path_factory.mktemp("sides") / "net.onnx")


@pytest.fixture(scope="module")
def wrong(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bad = copy.deepcopy(net)
    with torch.no_grad():
        next(bad.parameters()).mul_(1.01)
    return orepa.export_onnx(bad, images(), tmp_path_factory.mktemp("sides") / "wrong.onnx")


def test_a_path_is_a_side(net: nn.Module, file: Path, wrong: Path) -> None:
    assert orepa.verify(net, file, images(), stress=True)
    assert orepa.verify(net, str(file), images())
    assert orepa.verify(str(file), orepa.OnnxRunner(file), images())
    assert not orepa.verify(net, wrong, images())
    assert not orepa.verify(file, wrong, images())


def test_another_file_is_refused(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(
        ReparamError, match=r"best.pth: a file that is compared is an .onnx, an .xml"
    ):
        orepa.verify(net, tmp_path / "best.pth", images())
    with pytest.raises(ReparamError, match=r"none.onnx: no such file"):
        orepa.verify(net, tmp_path / "none.onnx", images())


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: dict[str, Any], gain: float, more: list[Tensor]) -> dict[str, Tensor]:
        return {"a": self.conv(x["image"]) * gain + more[0], "mask": x["image"].sum(1) > 0}


def test_nested_inputs_and_masks_go_through_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested().eval()
    batch = ({"image": torch.randn(2, 3, 8, 8)}, 2.0, [torch.randn(2, 4, 8, 8)])
    path = orepa.export_onnx(model, batch, tmp_path / "nested.onnx")
    report = orepa.verify(model, path, batch, stress=True)
    assert report, report
    assert {row.name for row in report.rows} == {"a", "mask"}
    bad = copy.deepcopy(model)
    with torch.no_grad():
        assert bad.conv.bias is not None
        bad.conv.bias += 0.1
    assert not orepa.verify(bad, path, batch)
    assert isinstance(OnnxRunner(path)(batch[0]["image"], batch[2][0]), dict)  # type: ignore[index]


def test_the_command_takes_shapes_from_the_files(file: Path, wrong: Path) -> None:
    assert main(["verify", str(file), str(file)]) == 0
    assert main(["verify", str(file), str(wrong)]) == 1


def test_a_random_reference_ends_the_command_with_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Noisy(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x + 0.01 * torch.randn_like(x)\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 1), Noisy())\n"
    )
    source = f"{tmp_path / 'nets.py'}:build"
    assert main(["verify", source, source, "--input-shape", "3x8x8"]) == 4
    assert "the first module that does so is 1 (Noisy)" in capsys.readouterr().err
