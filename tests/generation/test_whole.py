"""Kernels that are made by one compiled function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler import expand
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.generation.whole import generate_all


def test_a_1x1_weight_never_says_that_its_channels_lie_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the strides of the weight a conv decides how its maps lie, those of length one counted."""
    torch.manual_seed(0)
    model = expand(nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))).train()
    block = next(module for module in model.modules() if isinstance(module, ConvBlock))

    def with_strides_of_its_own(make: object, **_: object) -> object:
        def made() -> list[tuple[Tensor, Tensor | None]]:
            weight, bias = make()[0]  # type: ignore[operator]
            return [(weight.as_strided(weight.shape, (4, 1, 4, 4)), bias)]

        return made

    monkeypatch.setattr(torch, "compile", with_strides_of_its_own)
    (operator,) = generate_all(model, [block])
    assert operator.weight.stride() == (4, 1, 1, 1)
    assert torch.equal(operator.weight, block.weight)
    maps = torch.nn.functional.conv2d(torch.randn(2, 4, 6, 6), operator.weight, stride=2)
    assert maps.is_contiguous()
