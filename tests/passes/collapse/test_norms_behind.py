"""Norms that stand behind a conv with the border of a module between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.planning import recorded_plans
from tests.norms import randomise_norms


class Parent(nn.Module):
    """A stem whose last conv is inside, its norm outside; and a conv whose norm is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1))
        self.norm = nn.BatchNorm2d(5)
        self.conv = nn.Conv2d(5, 6, 3, stride=2, bias=False)
        self.after = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.conv(torch.relu(self.norm(self.stem(x)))))


class ReadsTheStemTwice(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        return self.after(self.conv(torch.relu(self.norm(stem)) + stem))


def prepared(model: nn.Module) -> tuple[nn.Module, Tensor]:
    return randomise_norms(model).double().eval(), torch.randn(2, 3, 11, 11, dtype=torch.float64)


def norms_left(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if is_batch_norm(module)]


@pytest.mark.parametrize("expand_first", [False, True])
def test_both_kinds_are_folded(expand_first: bool) -> None:
    model, x = prepared(Parent())
    deploy = orepa.collapse(orepa.expand(model) if expand_first else model)
    assert norms_left(deploy) == []
    assert isinstance(deploy.norm, nn.Identity)
    assert isinstance(deploy.after[0], nn.Identity)
    torch.testing.assert_close(deploy(x), model(x), rtol=0, atol=1e-12)


class ChannelsLast(nn.Module):
    """A layer of maps whose last axis is that of the channels, as all of speechbrain's."""

    def __init__(self, layer: nn.Module, first: int = 1, last: int = -1) -> None:
        super().__init__()
        self.layer, self.first, self.last = layer, first, last

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = self.layer(x.transpose(self.last, self.first))
        return x.transpose(self.first, self.last).reshape(shape[0], -1, x.shape[1])


class Lasting(nn.Module):
    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.conv, self.behind = ChannelsLastConv(), behind

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.behind(self.conv(x.flatten(2))))


class ChannelsLastConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(121, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, -1)).transpose(1, -1)


def test_axes_that_are_put_back_are_nothing_between() -> None:
    model, x = prepared(Lasting(ChannelsLast(nn.BatchNorm1d(3))))
    deploy = orepa.collapse(model)
    assert norms_left(deploy) == []
    torch.testing.assert_close(deploy(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("axes", [(1, 2), (0, 1), (0, -1)])
def test_axes_that_may_be_others_keep_the_norm(axes: tuple[int, int]) -> None:
    model, x = prepared(Lasting(ChannelsLast(nn.BatchNorm1d(3), *axes)))
    x = x.repeat(2, 1, 1, 1)[:3]
    deploy = orepa.collapse(model)
    assert norms_left(deploy) == ["behind.layer"]
    torch.testing.assert_close(deploy(x), model(x), rtol=0, atol=1e-12)


def test_a_value_that_is_read_elsewhere_too_keeps_its_norm() -> None:
    model, x = prepared(ReadsTheStemTwice())
    deploy = orepa.collapse(model)
    assert norms_left(deploy) == ["norm"]
    torch.testing.assert_close(deploy(x), model(x), rtol=0, atol=1e-12)


def test_a_hook_on_the_module_between_keeps_the_norm() -> None:
    model, x = prepared(Parent())
    seen: list[Tensor] = []
    model.stem.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = model(x)
    deploy = orepa.collapse(model)
    assert norms_left(deploy) == ["norm"]
    torch.testing.assert_close(deploy(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-12)


def test_the_activation_of_a_norm_behind_the_border_stays() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    model = Parent()
    model.norm = timm_layers.BatchNormAct2d(5, act_layer=nn.PReLU)
    model, x = prepared(model)
    deploy = orepa.collapse(model)
    assert norms_left(deploy) == []
    assert isinstance(deploy.norm, nn.PReLU)
    torch.testing.assert_close(deploy(x), model(x), rtol=0, atol=1e-12)


def test_the_plan_names_the_norm_that_goes() -> None:
    deploy = orepa.collapse(prepared(Parent())[0])
    edits = {edit.path: edit for edit in recorded_plans(deploy)[-1].edits}
    assert edits["stem.2"].options["behind"] == "norm"
    assert edits["stem.2"].before == "Conv2d + BatchNorm2d"
    assert edits["conv"].options["behind"] == "after.0"


def test_a_trainable_norm_behind_the_border_keeps_the_conv_trainable() -> None:
    model, _ = prepared(Parent())
    model.stem.requires_grad_(False)
    assert orepa.collapse(model).stem[2].weight.requires_grad


class Sum(nn.Module):
    """A block of branches, which is one linear layer to whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.point(x)


@pytest.mark.parametrize("expand_first", [False, True])
def test_a_block_with_its_norm_behind_the_border_is_one_region(expand_first: bool) -> None:
    model, x = prepared(nn.Sequential(Sum(), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())))
    expanded = orepa.expand(model, where="**").eval() if expand_first else model
    expected, deploy = expanded(x), orepa.collapse(expanded)
    assert norms_left(deploy) == []
    assert sum(isinstance(module, nn.Conv2d) for module in deploy.modules()) == 1
    torch.testing.assert_close(deploy(x), expected, rtol=0, atol=1e-12)
