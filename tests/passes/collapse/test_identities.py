"""Where a norm was folded stands an Identity that a fuse() of the model's class can read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import orepa_compiler as orepa
from orepa_compiler.passes.collapse.identities import identity_for
from tests.norms import randomise_norms


class Fuses(nn.Sequential):
    """Has a way of its own, which looks for a norm behind its conv."""

    def fuse(self) -> None:
        self[0], self[1] = fuse_conv_bn_eval(self[0], self[1]), nn.Identity()  # type: ignore[arg-type]


@pytest.mark.parametrize("affine", [True, False])
def test_the_place_of_a_norm_answers_as_one_that_does_nothing(affine: bool) -> None:
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=affine), nn.ReLU()
    net = randomise_norms(Fuses(*layers).double()).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    deploy = orepa.collapse(net)
    assert type(deploy[1]) is nn.Identity  # torch's own, which a pickle finds without this package
    assert deploy.state_dict().keys() == {"0.weight", "0.bias"}
    for made in (copy.deepcopy(deploy), deploy.half().double()):
        expected = made(x)
        made.fuse()
        assert torch.equal(made(x), expected)
    assert not list(orepa.collapse(nn.Sequential(*layers).eval()).buffers())
    torch.testing.assert_close(orepa.collapse(net)(x), net(x))


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.BatchNorm2d(3, track_running_stats=False)])
def test_the_place_of_another_layer_is_a_plain_identity(layer: nn.Module) -> None:
    assert not list(identity_for(layer).buffers())
