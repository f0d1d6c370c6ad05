"""Copies of a model: without values, and with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.capture.skeleton import value_copy


def images() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("verb", [orepa.expand, orepa.collapse, value_copy])
def test_a_kernel_with_a_graph_is_copied_as_values(verb: object) -> None:
    """weight_norm leaves one on its layer at each call, and copy.deepcopy refuses it."""
    net = nn.Sequential(
        nn.utils.weight_norm(nn.Conv2d(3, 3, 1)), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU()
    )
    net(images())
    assert not net[0].weight.is_leaf
    copied = verb(net)  # type: ignore[operator]
    torch.testing.assert_close(copied.eval()(images()), net.eval()(images()))
    assert copied[0].weight_g is not net[0].weight_g
    copied(images()).sum().backward()
    assert copied[0].weight_g.grad is not None
    assert net[0].weight_g.grad is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_the_parameters_of_a_scripted_part_can_be_trained_in_a_copy() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    inner[0].weight.requires_grad_(False)
    net = nn.Sequential(torch.jit.script(inner), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    expanded = orepa.expand(net)
    before, own = dict(net.named_parameters()), dict(expanded[0].named_parameters())
    assert all(parameter.is_leaf for parameter in own.values())
    assert [p.requires_grad for p in own.values()] == [False, True]
    assert not any(p is before[f"0.{name}"] for name, p in own.items())
    trained = torch.optim.SGD([p for p in expanded.parameters() if p.requires_grad], lr=1.0)
    expanded(images()).square().sum().backward()
    trained.step()
    assert not torch.equal(own["0.bias"], before["0.0.bias"])
    assert torch.equal(own["0.weight"], before["0.0.weight"])
