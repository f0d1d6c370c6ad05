"""onnxsim keeps the names and the numbers, or its file is not taken."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from orepa_compiler.errors import ExportError
from orepa_compiler.export import OnnxRunner, export_onnx
from orepa_compiler.export.onnx import writing as exporting
from orepa_compiler.export.onnx.external_data import external_files
from orepa_compiler.export.onnx.inspection import torch_module
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.export.onnx.simplification import agree, check_same, simplify_file
from tests.export.nets import SmallNet, images

onnxsim = pytest.importorskip("onnxsim")


def named_nodes(path: Path) -> list[tuple[str, str | None]]:
    return [(node.op_type, torch_module(node)) for node in load_graph(path).graph]


def properties(path: Path) -> dict[str, str]:
    return load_graph(path).metadata_props


@pytest.fixture
def copied(exported: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(exported["fp32"], tmp_path / "net.onnx"))


def test_modules_and_properties_survive(copied: Path) -> None:
    before, said = named_nodes(copied), properties(copied)
    simplify_file(copied, (images(),))
    assert named_nodes(copied) == before
    assert properties(copied) == said
    assert os.listdir(copied.parent) == ["net.onnx"]


def test_an_export_can_be_simplified(net: SmallNet, tmp_path: Path) -> None:
    path = export_onnx(net, images(), tmp_path / "net.onnx", simplify=True)
    assert ("Conv", "conv1") in named_nodes(path)


def simplify_wrongly(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    def simplify(path: str) -> tuple[onnx.ModelProto, bool]:
        changed = onnx.load(path)
        change(changed)
        return changed, True

    monkeypatch.setattr(onnxsim, "simplify", simplify)


def halve_a_bias(model: onnx.ModelProto) -> None:
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) / 2, bias.name))


def test_changed_values_are_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simplify_wrongly(monkeypatch, halve_a_bias)
    before = copied.read_bytes()
    with pytest.raises(ExportError, match=r"simplify=True changed the values of output output"):
        simplify_file(copied, (images(),))
    assert copied.read_bytes() == before


def test_changed_outputs_are_refused() -> None:
    with pytest.raises(ExportError, match=r"changed the outputs \['a'\] to \['output'\]"):
        check_same({"a": torch.ones(1)}, torch.ones(1))


def test_external_weights_stay_external_and_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "EMBED_LIMIT_BYTES", 100)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 32, 3)).eval()
    path = export_onnx(net, images(), tmp_path / "net.onnx", simplify=True)
    (weights,) = external_files(load_graph(path))
    assert sorted(os.listdir(tmp_path)) == sorted(["net.onnx", weights])
    assert (tmp_path / weights).stat().st_size > 4 * 32 * 32 * 9
    assert named_nodes(path) == [("Conv", "0"), ("Conv", "1")]
    output = OnnxRunner(path)(images())
    assert isinstance(output, torch.Tensor)
    torch.testing.assert_close(output, net(images()), rtol=1e-4, atol=1e-5)


def test_a_comparison_that_cannot_run_is_no_pass(exported: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(exported["bf16"], tmp_path / "net.onnx"))
    with pytest.raises(ExportError, match=r"not run: CPUExecutionProvider lacks bfloat16"):
        simplify_file(path, (images().bfloat16(),))


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("reference", "candidate", "verdict"),
    [
        (ONES, ONES * (1 + 1e-6), True),
        (ONES, ONES * (1 + 1e-4), False),
        (1e6 * ONES, 1e6 * ONES + 1, True),
        (ONES.half(), (ONES * (1 + 5e-3)).half(), True),
        (ONES.half(), ONES, False),
        (ONES, torch.ones(3, 1), False),
        (ONES, ONES * float("nan"), False),
        (ONES * float("inf"), ONES * float("inf"), False),
        (ONES * float("inf"), ONES, False),
        (torch.ones(0), torch.ones(0), False),
        (ONES.long(), ONES.long(), True),
        (ONES.long(), 2 * ONES.long(), False),
    ],
)
def test_agreement_is_relative_and_never_empty_or_nan(
    reference: torch.Tensor, candidate: torch.Tensor, verdict: bool
) -> None:
    assert agree(reference, candidate) is verdict
