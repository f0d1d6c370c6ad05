"""Inputs that do not fit an exported file are refused with what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orepa_compiler.errors import ExportError
from orepa_compiler.export.run.signature import TensorSpec, match_inputs

IMAGE = TensorSpec("image", ("batch", 3, 8, 8), torch.float32)
MASK = TensorSpec("mask", ("batch", -1), torch.bool)
FILE = Path("net.onnx")


def image(batch: int = 2) -> torch.Tensor:
    return torch.zeros(batch, 3, 8, 8)


def mask(batch: int = 2, size: int = 5) -> torch.Tensor:
    return torch.zeros(batch, size, dtype=torch.bool)


def test_inputs_match_by_position_and_by_name_in_the_order_of_the_file() -> None:
    for matched in (
        match_inputs(FILE, (IMAGE, MASK), (image(), mask()), {}),
        match_inputs(FILE, (IMAGE, MASK), (image(),), {"mask": mask()}),
        match_inputs(FILE, (IMAGE, MASK), (), {"mask": mask(), "image": image()}),
    ):
        assert list(matched) == ["image", "mask"]
        assert matched["mask"].dtype == torch.bool


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ((), {}),
        ((image(),), {}),
        ((image(), mask(), mask()), {}),
        ((image(),), {"image": image()}),
        ((image(),), {"masks": mask()}),
    ],
)
def test_missing_surplus_and_unknown_inputs_are_refused(inputs: tuple, named: dict) -> None:
    wanted = r"takes image: float32 \(batch, 3, 8, 8\); mask: bool \(batch, -1\), but"
    with pytest.raises(ExportError, match=wanted):
        match_inputs(FILE, (IMAGE, MASK), inputs, named)


def test_another_type_is_refused_with_the_cast() -> None:
    with pytest.raises(ExportError, match=r"image is float64.*takes float32.*\.to\(torch.float32"):
        match_inputs(FILE, (IMAGE,), (image().double(),), {})


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(ExportError, match=r"image is a list; pass a torch tensor"):
        match_inputs(FILE, (IMAGE,), ([1.0],), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (3, 8, 8), (2, 3, 8, 8, 1)])
def test_another_shape_is_refused_with_both(shape: tuple[int, ...]) -> None:
    with pytest.raises(ExportError, match=r"image has shape \(.*takes \(batch, 3, 8, 8\)"):
        match_inputs(FILE, (IMAGE,), (torch.zeros(shape),), {})


def test_one_symbol_has_one_size() -> None:
    with pytest.raises(ExportError, match=r"mask has shape \(3, 5\).*with \{'batch': 2\}"):
        match_inputs(FILE, (IMAGE, MASK), (image(2), mask(3)), {})
