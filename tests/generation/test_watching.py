"""A model in training form that goes to a file by another way than ours: a word, and one only."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.errors import TrainingFormWarning

WAYS: dict[str, Callable[[nn.Module, Tensor, Path], object]] = {
    "torch.jit.trace": lambda model, x, path: torch.jit.trace(model, x),
    "torch.export": lambda model, x, path: torch.export.export(model, (x,)),
    "torch.onnx": lambda model, x, path: torch.onnx.export(
        model, (x,), path / "model.onnx", dynamo=True, verbose=False
    ),
}
TOOLS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "eager": lambda model, x: model(x).sum().backward(),
    "compile": lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
    "evaluation": lambda model, x: torch.inference_mode()(model)(x),
    "functional_call": lambda model, x: torch.func.grad(
        lambda scaling: torch.func.functional_call(model, {"0.scaling": scaling}, (x,)).sum()
    )(model[0].scaling.detach()),  # type: ignore[index]
    "plan and verify": lambda model, x: (
        orepa.plan(model),
        orepa.verify(model, orepa.collapse(model), x),
    ),
    "copy": lambda model, x: copy.deepcopy(model),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    convs = [nn.Conv2d(width, 4, 3, padding=1, bias=False) for width in (3, 4)]
    net = nn.Sequential(convs[0], nn.BatchNorm2d(4), convs[1], nn.BatchNorm2d(4))
    return orepa.expand(net, block=orepa.OREPA)


def warned(call: Callable[[], object]) -> list[str]:
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        call()
    return [str(warning.message) for warning in seen if warning.category is TrainingFormWarning]


@pytest.mark.parametrize("way", WAYS)
def test_a_word_where_the_branches_would_go_to_a_file(
    model: nn.Module, way: str, tmp_path: Path
) -> None:
    x = torch.randn(2, 3, 8, 8)
    expected = (
        "a model in training form is being exported: the file will make every kernel of its blocks "
        "anew at each call; export orepa.collapse(model) instead"
    )
    assert warned(lambda: WAYS[way](model.eval(), x, tmp_path)) == [expected]
    assert not warned(lambda: WAYS[way](orepa.collapse(model), x, tmp_path))


@pytest.mark.parametrize("tool", TOOLS)
def test_no_word_in_training(model: nn.Module, tool: str) -> None:
    assert not warned(lambda: TOOLS[tool](model.eval(), torch.randn(2, 3, 8, 8)))
