"""An expanded model in the tools of training: torch.compile, torch.export, averaging, pickle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import orepa_compiler as orepa
from tests.norms import randomise_norms


@pytest.fixture
def expanded() -> nn.Module:
    stem = (nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU())
    body = (nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1))
    return orepa.expand(randomise_norms(nn.Sequential(*stem, *body, nn.BatchNorm2d(4))))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 12, 12)


def test_compiles_without_a_graph_break(expanded: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    expanded, x = expanded.double(), x.double()  # eager adds in another order
    compiled = torch.compile(copy.deepcopy(expanded), backend="eager", fullgraph=True)
    expected = expanded(x)
    expected.square().sum().backward()
    found = compiled(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    pairs = zip(compiled.parameters(), expanded.parameters(), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_exports_with_torch_export(expanded: nn.Module, x: Tensor) -> None:
    expanded.eval()
    with pytest.warns(orepa.TrainingFormWarning):
        program = torch.export.export(expanded, (x,))
    torch.testing.assert_close(program.module()(x), expanded(x))


def test_average_pickle_and_functional_call(expanded: nn.Module, x: Tensor) -> None:
    expanded.eval()
    averaged = AveragedModel(expanded)
    averaged.update_parameters(expanded)
    torch.testing.assert_close(averaged.module.eval()(x), expanded(x))
    again = pickle.loads(pickle.dumps(expanded))
    torch.testing.assert_close(again(x), expanded(x), rtol=0, atol=0)
    called = torch.func.functional_call(expanded, dict(expanded.named_parameters()), (x,))
    torch.testing.assert_close(called, expanded(x), rtol=0, atol=0)


def test_channels_last_gives_the_same(expanded: nn.Module, x: Tensor) -> None:
    expanded.eval()
    expected = expanded(x)
    found = expanded.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)
