"""Where two models part, and what is said where that cannot be found."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.proving.locating import UNSEEN, explain, explain_report, locate
from orepa_compiler.verification import verify_callables
from tests.norms import randomise_norms

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1))
    body = [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)]
    return randomise_norms(nn.Sequential(stem, *body)).eval()


def test_a_right_collapse_has_no_first_wrong_module(model: nn.Module) -> None:
    assert locate(model, orepa.collapse(model), X) is None
    assert explain(model, orepa.collapse(model), X) == UNSEEN


def test_a_norm_that_lies_outside_its_convs_container_is_one_with_it(model: nn.Module) -> None:
    deploy = orepa.collapse(model)
    with torch.no_grad():
        deploy.get_submodule("0.2").weight[0, 0, 0, 0] += 1
    found = locate(model, deploy, X)
    assert found is not None
    assert (found.module, found.kind, found.agreeing) == ("0.2", "Conv2d + BatchNorm2d", 2)


def test_models_are_left_as_they_were(model: nn.Module) -> None:
    deploy = orepa.collapse(model).train()
    state = copy.deepcopy(deploy.state_dict())
    locate(model.train(), deploy, X)
    assert model.training
    assert deploy.training
    assert all(torch.equal(state[key], value) for key, value in deploy.state_dict().items())
    assert not any(child._forward_hooks for child in [*model.modules(), *deploy.modules()])


def test_what_shows_no_modules_is_told(model: nn.Module) -> None:
    assert "the candidate shows no modules" in str(explain(model, lambda x: x, X))
    assert "the reference is not a torch model" in str(explain(lambda x: x, model, X))


def test_a_forward_that_fails_alone_is_told(model: nn.Module) -> None:
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.float32:
                raise RuntimeError("float32 only")
            return x

    text = str(explain(nn.Sequential(Picky()), nn.Sequential(Picky()), X))
    assert text == "the modules could not be run one by one (RuntimeError: float32 only)"


def test_the_batch_of_the_worst_row_is_looked_at(model: nn.Module) -> None:
    deploy = orepa.collapse(model)
    deploy[2] = nn.Hardtanh(0, float(model[:3](X).detach().max()))
    report = verify_callables(model, deploy, X, stress=True)
    assert report.worst is not None
    assert report.worst.made == "large"
    assert str(explain_report(model, deploy, X, report)).startswith("first diverging module: 2 (Re")
    assert (
        explain_report(model, deploy, [], verify_callables(model, deploy, []))
        == "no inputs were given"
    )
