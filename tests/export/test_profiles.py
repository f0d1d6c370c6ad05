"""The profile of shapes: defaults, what is taken, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orepa_compiler.errors import ExportError
from orepa_compiler.export import build_engine
from orepa_compiler.export.gates.network import parse_network
from orepa_compiler.export.tensorrt import profiles
from tests.export.graphs import WIDE, conv, model
from tests.export.test_network import saved

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")


IMAGE = (-1, 3, 16, 16)


def test_a_symbolic_batch_gets_the_default_range() -> None:
    assert profiles.shape_range("x", IMAGE, None) == [(b, 3, 16, 16) for b in (1, 8, 32)]


def test_shapes_that_fit_are_taken() -> None:
    shapes = [(2, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16)]
    assert profiles.shape_range("x", IMAGE, shapes) == shapes


@pytest.mark.parametrize(
    "batches", [(1, 2), (1, 2, 3, 4), (2, 1, 3), (1, 4, 3), (0, 1, 2)], ids=str
)
def test_other_than_three_rising_shapes_are_refused(batches: tuple[int, ...]) -> None:
    with pytest.raises(ExportError, match=r"shapes of input x are.*three rising shapes that fit"):
        profiles.shape_range("x", IMAGE, [(batch, 3, 16, 16) for batch in batches])


@pytest.mark.parametrize("shape", [(1, 3, 16, 17), (1, 3, 16)], ids=str)
def test_shapes_that_do_not_fit_the_input_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ExportError, match=r"pass three rising shapes that fit \(-1, 3, 16, 16\)"):
        profiles.shape_range("x", IMAGE, [shape] * 3)


def test_further_symbolic_axes_need_shapes() -> None:
    with pytest.raises(ExportError, match=r"input x has symbolic axes beside the batch.*shapes="):
        profiles.shape_range("x", (-1, 3, -1, -1), None)


@pytest.mark.usefixtures("no_gpu")
def test_shapes_of_an_unknown_input_are_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    message = r"shapes names \['x'\], but the inputs with symbolic axes are \['image'\]"
    with pytest.raises(ExportError, match=message):
        build_engine(exported["fp32"], tmp_path / "net.engine", shapes={"x": [IMAGE] * 3})


class Config:
    """Takes a profile, or refuses it."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.profiles: list[Any] = []
        self.refuses = refuses

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return -1 if self.refuses else 0


@pytest.mark.usefixtures("no_gpu")
def test_given_shapes_reach_the_profile(tmp_path: Path) -> None:
    source = saved(model(conv("x", "a", kernel_shape=[3, 3])), tmp_path)
    shapes = [(1, 4, 9, 9), (1, 4, 16, 16), (3, 4, 32, 16)]
    parsed, config = parse_network(tensorrt_rtx, source), Config()
    profiles.set_shapes(parsed, config, {"x": shapes})
    (profile,) = config.profiles
    assert [tuple(shape) for shape in profile.get_shape("x")] == shapes
    build_engine(source, tmp_path / "net.engine", shapes={"x": shapes})


def test_a_refused_profile_is_told(exported: dict[str, Path]) -> None:
    parsed = parse_network(tensorrt_rtx, exported["fp32"])
    with pytest.raises(ExportError, match=r"TensorRT refuses the shapes .*image"):
        profiles.set_shapes(parsed, Config(refuses=True), {})


@pytest.mark.usefixtures("no_gpu")
def test_a_file_without_symbolic_axes_needs_no_shapes(tmp_path: Path) -> None:
    made = model(conv("x", "a", **WIDE))
    for value in (made.graph.input[0], made.graph.output[0]):
        for dim, size in zip(value.type.tensor_type.shape.dim, (2, 4, 8, 8), strict=True):
            dim.dim_value = size
    source = saved(made, tmp_path)
    build_engine(source, tmp_path / "net.engine")
    with pytest.raises(ExportError, match=r"the inputs with symbolic axes are none"):
        build_engine(source, tmp_path / "net.engine", shapes={"x": [(2, 4, 8, 8)] * 3})


@pytest.mark.usefixtures("no_gpu")
def test_shapes_alone_are_those_of_the_only_input(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    parsed, config = parse_network(tensorrt_rtx, exported["fp32"]), Config()
    shapes = [(1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16)]
    profiles.set_shapes(parsed, config, shapes)
    (profile,) = config.profiles
    assert [tuple(shape) for shape in profile.get_shape("image")] == shapes
    made = model(conv("x", "a", **WIDE))
    for value in (made.graph.input[0], made.graph.output[0]):
        for dim, size in zip(value.type.tensor_type.shape.dim, (2, 4, 8, 8), strict=True):
            dim.dim_value = size
    fixed = parse_network(tensorrt_rtx, saved(made, tmp_path))
    message = r"name no input, and the file has 0 with symbolic axes \(none\); give them by name"
    with pytest.raises(ExportError, match=message):
        profiles.set_shapes(fixed, Config(), shapes)
