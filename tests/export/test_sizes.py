"""Open height and width, and names of inputs and outputs: kept in the file, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import orepa_compiler as orepa
from orepa_compiler.cli.run import sampling
from orepa_compiler.errors import ExportError
from orepa_compiler.export import OnnxRunner, export_onnx
from orepa_compiler.export.onnx import sizes, writing
from orepa_compiler.export.onnx.images import renamed, size_symbols
from tests.export.nets import DictNet, Returns, SmallNet, images


def axes(path: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(path).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(left), self.conv(right)


def halves(image: Tensor, x: Tensor) -> Tensor:
    return functional.interpolate(x, size=(int(image.shape[2] * 0.5), int(image.shape[3] * 0.5)))


def padded(image: Tensor, x: Tensor) -> Tensor:
    rest = image.shape[2] % 8
    return functional.pad(x, (0, 0, 0, 8 - rest)) if rest else x


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 256, 2))


def test_height_and_width_are_symbols_and_right_at_other_sizes(tmp_path: Path) -> None:
    net = DictNet().eval()
    path = export_onnx(net, images(2, 16), tmp_path / "net.onnx", dynamic_size=True)
    assert axes(path)["image"] == ["batch", 3, "height", "width"]
    inputs = [images(2, 16), images(1, 40)[..., :21], images(3, 9)]
    assert orepa.verify(net, path, inputs)
    with torch.no_grad():
        net.fc.weight.mul_(1.01)
    with pytest.raises(ExportError, match=r"file gives another logits than the model at \(48, 80"):
        sizes.check_other_sizes(path, net, (images(),), precision="fp32")
    sizes.check_other_sizes(path, net, (images(),), precision="fp16")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            flattened,
            r"no height and width but \(16, 16\): at \(48, 80\) it raises RuntimeError: mat",
        ),
        (lambda: Returns(halves), r"gives another output at \(48, 80\): its forward decides by"),
        (lambda: Returns(padded), r"gives another output at \(17, 17\): its forward decides by"),
        (lambda: nn.AdaptiveAvgPool2d(3), r"the file does not run at \(48, 80\) \(onnxruntime fai"),
    ],
    ids=["flattened", "a number of the size", "a branch by the size", "pooling to 3x3"],
)
def test_a_model_that_fixes_its_size_is_refused(
    model: Callable[[], nn.Module], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=said):
        export_onnx(model().eval(), images(), tmp_path / "net.onnx", dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_inputs_without_a_height_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no input has a height and a width \(their shapes are"):
        export_onnx(
            nn.Conv1d(3, 4, 3).eval(), torch.randn(2, 3, 8), tmp_path / "a.onnx", dynamic_size=True
        )


def test_a_size_that_the_exporter_fixes_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orepa_compiler.export.onnx.program.axis_names", lambda dimensions: {})
    with pytest.raises(ExportError, match="the model fixes the height of the input image at 16"):
        export_onnx(SmallNet().eval(), images(), tmp_path / "net.onnx", dynamic_size=True)
    monkeypatch.setattr(writing, "check_traced", lambda *given, **options: None)
    with pytest.raises(ExportError, match="input image has sizes \\[16, 16\\] in the file"):
        export_onnx(SmallNet().eval(), images(), tmp_path / "net.onnx", dynamic_size=True)


def test_symbols_have_the_names_of_what_they_are() -> None:
    shapes = [("a", ["s0", 3, "s1", "s1"]), ("b", ["s0", 3, "s2", 7]), ("c", ["s0", 3, "s4", "s5"])]
    names = size_symbols([*shapes, ("d", ["s0", "s9"])])
    assert names == {"s1": "size", "s2": "height", "s4": "c_height", "s5": "width"}
    assert renamed("4*s1 + s11//s2", names) == "4*size + s11//height"


def test_each_image_has_sizes_and_a_name_of_its_own(tmp_path: Path) -> None:
    net, batch = Pair().eval(), (images(2, 16), images(2, 8))
    path = export_onnx(
        net,
        batch,
        tmp_path / "pair.onnx",
        dynamic_size=True,
        input_names=["right", "b"],
        output_names=("left", "y"),
    )
    assert axes(path) == {
        "right": ["batch", 3, "height", "width"],
        "b": ["batch", 3, "b_height", "b_width"],
        "left": ["batch", 4, "height", "width"],
        "y": ["batch", 4, "b_height", "b_width"],
    }
    assert orepa.verify(net, path, batch)


def test_a_lone_output_of_another_name_is_still_a_tensor(tmp_path: Path) -> None:
    path = export_onnx(SmallNet().eval(), images(), tmp_path / "s.onnx", output_names=["image"])
    assert list(axes(path)) == ["input_image", "image"]
    assert isinstance(OnnxRunner(path)(images()), Tensor)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"input_names": "x"}, "input_names='x' is one text; give a list of names"),
        ({"input_names": []}, "input_names holds no name; leave it out"),
        ({"input_names": ["a", "b"]}, r"2 names \(a, b\) for 1 inputs; give one for each tensor"),
        ({"input_names": ["a b"]}, "'a b' is no name; write one word without spaces"),
        ({"input_names": ["output"]}, "'output' is the name of an output; give another"),
        ({"output_names": ["y", "y"]}, "'y' stands there twice; give each a name of its own"),
        ({"output_names": ["y", "z"]}, r"2 names \(y, z\) for 1 outputs \(output\)"),
        ({"input_names": ["y"], "output_names": ["y"]}, "'y' names an input and an output"),
    ],
)
def test_names_that_cannot_be(names: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=said):
        export_onnx(SmallNet().eval(), images(), tmp_path / "net.onnx", **names)
    assert not list(tmp_path.iterdir())


def test_outputs_that_the_model_names_keep_their_names(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"returns its outputs by name \(logits, features\)"):
        export_onnx(DictNet().eval(), images(), tmp_path / "a.onnx", output_names=["a", "b"])


def test_the_second_size_lies_in_the_range_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    value = SimpleNamespace(name="image")
    held = SimpleNamespace(graph=SimpleNamespace(inputs=[value]))
    monkeypatch.setattr(sampling, "load_graph", lambda path: held)
    shapes = ((1, 3, 8, 8), (2, 3, 16, 16), (4, 3, 24, 32))
    for profile in (shapes, {"image": shapes}):
        request: Any = SimpleNamespace(profile=profile, onnx=Path("net.onnx"))
        for given, second in (((16, 16), (24, 32)), ((24, 32), (8, 8))):
            found = sampling.second_size(request, nn.Identity(), (torch.randn(2, 3, *given),))
            assert [tuple(tensor.shape) for tensor in found[0]] == [(2, 3, *second)]
