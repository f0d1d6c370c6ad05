"""Which module computes in which precision: float32 where it was asked for, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orepa_compiler.errors import ExportError
from orepa_compiler.export import OnnxRunner, export_onnx
from orepa_compiler.export.gates.artifact import check_precision
from orepa_compiler.export.onnx.inspection import conv_nodes
from orepa_compiler.export.onnx.precision import cast, kept_modules, lies_in
from orepa_compiler.export.onnx.reading import load_graph
from tests.export.nets import SmallNet, images


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ("block*", ("block",)),
        ("block.*", ("block.0", "block.1", "block.2")),
        (["fc", "block.2"], ("block.2", "fc")),
        ([], ()),
    ],
)
def test_patterns_name_the_outermost_modules(
    net: SmallNet, patterns: str | list[str], kept: tuple[str, ...]
) -> None:
    assert kept_modules(net, patterns) == kept


def test_a_pattern_that_matches_nothing_is_refused(net: SmallNet) -> None:
    with pytest.raises(ExportError, match=r"'blok' matches none of the 6 modules; give a glob"):
        kept_modules(net, ["fc", "blok"])


def test_a_module_lies_in_itself_and_in_those_around_it() -> None:
    assert lies_in("a.b.c", ("a.b",))
    assert lies_in("a.b", ("a.b",))
    assert not lies_in("a.bc", ("a.b",))
    assert not lies_in("a", ("a.b",))
    assert not lies_in(None, ("a",))


def test_a_kept_module_computes_in_float32_and_returns_half(net: SmallNet) -> None:
    typed = cast(net, torch.float16, keep=("block",))
    assert typed.get_parameter("block.0.weight").dtype == torch.float32
    assert torch.equal(typed.get_parameter("block.0.weight"), net.block[0].weight)
    assert typed.get_parameter("conv1.weight").dtype == torch.float16
    assert net.conv1.weight.dtype == torch.float32
    with torch.no_grad():
        assert typed.get_submodule("block")(torch.ones(1, 8, 4, 4).half()).dtype == torch.float16
        assert typed(images().half()).dtype == torch.float16


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_file_holds_both_precisions_and_is_checked_for_them(
    net: SmallNet, tmp_path: Path, precision: str
) -> None:
    path = export_onnx(
        net, images(), tmp_path / "net.onnx", precision=precision, keep_fp32=["block"]
    )
    element = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision]
    convs = conv_nodes(load_graph(path))
    types = {conv.module: (conv.input_type, conv.weight_type) for conv in convs}
    assert types == {
        "conv1": (element, element),
        "block.0": ("FLOAT", "FLOAT"),
        "block.2": ("FLOAT", "FLOAT"),
    }
    check_precision(convs, element, kept=("block",))
    with pytest.raises(ExportError, match=rf"^block.0: the conv's input is FLOAT .*but {element}"):
        check_precision(convs, element)
    with pytest.raises(
        ExportError, match=rf"^conv1: the conv's input is {element} .*but FLOAT was"
    ):
        check_precision(convs, element, kept=("block", "conv1"))


def test_what_would_overflow_is_right_where_it_is_kept(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        net[1][0].weight.mul_(1e6)
        net[1][1].weight.mul_(1e-6)
    net.eval()
    with pytest.raises(ExportError, match=r"1.0.weight: its largest .*with keep_fp32"):
        export_onnx(net, images(), tmp_path / "net.onnx", precision="fp16")
    path = export_onnx(net, images(), tmp_path / "net.onnx", precision="fp16", keep_fp32="1")
    output = OnnxRunner(path)(images().half())
    assert isinstance(output, torch.Tensor)
    torch.testing.assert_close(output.float(), net(images()), rtol=1e-2, atol=5e-3)


def test_an_unknown_precision_is_refused(net: SmallNet, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"precision='fp8' is not one of fp32, fp16, bf16, int8"):
        export_onnx(net, images(), tmp_path / "net.onnx", precision="fp8")  # type: ignore[arg-type]


class OwnApply(nn.Sequential):
    """Moves a tensor that is not registered, as detectors do with their strides."""

    stride = torch.tensor([8.0])

    def _apply(self, fn: Any) -> OwnApply:  # type: ignore[override]
        super()._apply(fn)
        self.stride = fn(self.stride)
        return self


def test_a_module_with_an_apply_of_its_own_is_cast_once() -> None:
    net = OwnApply(nn.Conv2d(3, 4, 1), OwnApply(nn.Conv2d(4, 4, 1)))
    half = cast(net, torch.float16, keep=["1.0"])
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    assert dtypes["0.weight"] == torch.float16
    assert dtypes["1.0.weight"] == torch.float32
    assert net[0].weight.dtype == torch.float32
