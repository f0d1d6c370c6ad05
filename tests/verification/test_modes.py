"""Sides are evaluated as their own eval() leaves them, and come back as they were."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.verification.modes import evaluation_mode


class KeepsItsNorm(nn.Sequential):
    """A model whose own train() leaves its norm by the statistics of the batch."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self[1].training = True
        return self


class LowRank(nn.Linear):
    """A layer that merges an update into its weight for evaluation, past the version counter."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.update = nn.Parameter(torch.randn(4, 4))
        self.is_merged = False
        self.calls: list[bool] = []

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.calls.append(mode)
        if self.is_merged == mode:
            sign = -1.0 if mode else 1.0
            self.weight.data += sign * 0.1 * self.update
            self.is_merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.is_merged else y + 0.1 * x @ self.update.T


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_norm_that_a_model_keeps_in_batch_mode_is_evaluated_so() -> None:
    torch.manual_seed(0)
    model = KeepsItsNorm(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    fixed = nn.Sequential(*model).eval()  # the same layers, by the running statistics
    fixed[1] = nn.BatchNorm2d(4).eval()
    flags = [module.training for module in model.modules()]
    report = orepa.verify(model, fixed, torch.randn(4, 3, 8, 8) * 3 + 1)
    assert not report
    assert "above the tolerance" in report.verdict
    assert [module.training for module in model.modules()] == flags


def test_flags_of_every_module_come_back_one_by_one() -> None:
    first = nn.Dropout()
    model = nn.Sequential(nn.Dropout(), nn.Sequential(first, nn.Dropout())).train()
    first.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [m.training for m in model.modules()] == [True, True, True, False, True]


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_that_merges_weights_is_merged_inside_and_as_it_was_after(mode: bool) -> None:
    torch.manual_seed(0)
    layer = LowRank()
    model = nn.Sequential(layer, nn.ReLU())
    model.train(mode)
    before, merged = state_of(model), layer.is_merged
    with evaluation_mode(model):
        assert layer.is_merged
        assert torch.equal(layer.weight, before["0.weight"]) is not mode
    assert layer.is_merged is merged
    assert layer.training is mode
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_eval_registers_and_removes_is_put_back() -> None:
    class Swaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Conv2d(1, 1, 1)

        def eval(self) -> Any:
            self.other, self.scale = nn.Conv2d(1, 1, 1), torch.ones(1)
            del self.branch
            return super().eval()

    model = Swaps().train()
    names = set(vars(model)), set(model._modules), [k for k, _ in model.named_parameters()]
    with evaluation_mode(model):
        assert not hasattr(model, "branch")
    assert (
        set(vars(model)),
        set(model._modules),
        [k for k, _ in model.named_parameters()],
    ) == names
    assert model.training
    assert model.branch.training


def test_what_the_body_changes_stays_changed() -> None:
    conv = nn.Conv2d(3, 4, 3)
    model = KeepsItsNorm(conv, nn.BatchNorm2d(4))
    with evaluation_mode(model):
        conv.weight.data.zero_()
        vars(model)["note"] = "kept"
    assert not conv.weight.any()
    assert vars(model)["note"] == "kept"


def test_it_comes_back_when_its_own_eval_raises() -> None:
    class Breaks(LowRank):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            if not mode:
                raise RuntimeError("no")
            return self

    model = Breaks().train()
    weight = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="no"), evaluation_mode(model):
        pytest.fail("must not start")
    assert model.training
    assert torch.equal(model.weight, weight)


def exported() -> tuple[nn.Module, nn.Module]:
    """A net, and the program of torch.export that was made of it."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    return net, torch.export.export(net, (torch.randn(2, 3, 8, 8),)).module()


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, where it is copied
def test_a_program_of_torch_export_is_compared_in_the_mode_that_it_was_exported_in() -> None:
    net, program = exported()
    images = torch.randn(2, 3, 8, 8)
    assert orepa.verify(net, program, images)
    assert orepa.verify(program, net, images)
    other = deepcopy(net)  # the program holds the very weights of the net
    with torch.no_grad():
        other.get_parameter("0.weight")[0] *= 1.01
    assert not orepa.verify(other, program, images)


def test_a_program_inside_of_a_model_is_refused_with_what_to_do() -> None:
    net, program = exported()
    whole = nn.Sequential(program, nn.ReLU())
    with pytest.raises(orepa.ReparamError, match=r"a Sequential cannot be put in eval mode: .*not"):
        orepa.verify(nn.Sequential(net, nn.ReLU()), whole, torch.randn(2, 3, 8, 8))
