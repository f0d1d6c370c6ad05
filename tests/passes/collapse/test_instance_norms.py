"""InstanceNorm with tracked statistics: of each image in train mode, affine in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from tests.norms import randomise_norms


def tracked(channels: int = 8, **options: Any) -> nn.InstanceNorm2d:
    return nn.InstanceNorm2d(channels, track_running_stats=True, **options)


def settled(net: nn.Module) -> tuple[nn.Module, Tensor]:
    return randomise_norms(net).double().eval(), torch.randn(2, 3, 7, 7, dtype=torch.float64)


def norms_of(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.InstanceNorm2d)]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.norm_a, self.norm_b = tracked(affine=True), tracked()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm_a(self.a(x)) + self.norm_b(self.b(x)))


class KeptTraining(nn.Sequential):
    def train(self, mode: bool = True) -> KeptTraining:
        super().train(mode)
        self[1].train()
        return self


def test_a_tracked_norm_is_folded_behind_and_before_a_conv() -> None:
    net, x = settled(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, bias=False), tracked(), nn.ReLU()),
            *(tracked(affine=True), nn.Conv2d(8, 8, 1)),
        )
    )
    flat = orepa.collapse(orepa.expand(net))
    assert not norms_of(flat)
    torch.testing.assert_close(flat(x), net(x))
    torch.testing.assert_close(flat(x[0]), net(x[0]))


def test_branches_with_tracked_norms_become_one_conv_and_stay_apart_in_training() -> None:
    net, x = settled(Branches())
    flat = orepa.collapse(net)
    assert not norms_of(flat)
    torch.testing.assert_close(flat(x), net(x))
    plan = orepa.plan(net, block=orepa.OREPA)
    assert not plan.of("linearize").edits
    assert "it normalizes each image in train mode" in "".join(r.reason for r in plan.refusals)
    torch.testing.assert_close(orepa.expand(net).train()(x), net.train()(x))


def test_one_that_takes_the_statistics_of_each_image_stays() -> None:
    for made in (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True)),
        KeptTraining(nn.Conv2d(3, 8, 3), tracked()),
    ):
        net, x = settled(made)
        flat = orepa.collapse(net)
        assert len(norms_of(flat)) == 1
        torch.testing.assert_close(flat(x), net(x))


def test_a_norm_that_no_longer_uses_its_statistics_stays_and_says_so() -> None:
    net, x = settled(nn.Sequential(nn.Conv2d(3, 8, 3), tracked()))
    net[1].track_running_stats = False  # type: ignore[union-attr]
    flat = orepa.collapse(net)
    torch.testing.assert_close(flat(x), net(x))
    (refusal,) = orepa.recorded_plans(flat)[-1].refusals
    assert refusal.reason == "InstanceNorm2d takes the statistics of each image in eval mode"
