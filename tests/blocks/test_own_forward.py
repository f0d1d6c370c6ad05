"""Blocks for convs with a forward of their own, and norms folded into such convs."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.blocks.own_forward import OwnForwardConv
from tests.norms import randomise_norms


class Standardized(nn.Conv2d):
    """A conv that normalizes its kernel, with a gain of its own."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        axes = (1, 2, 3)
        weight = self.weight - self.weight.mean(axes, keepdim=True)
        weight = self.gain * weight / (weight.std(axes, keepdim=True) + 1e-4)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


CONVS = {
    "own class": lambda: Standardized(4, 8, 3, padding=1),
    "StdConv2d": lambda: timm.layers.StdConv2d(4, 8, 3, padding=1),
    "StdConv2dSame": lambda: timm.layers.StdConv2dSame(4, 8, 3, stride=2),
    "ScaledStdConv2d": lambda: timm.layers.ScaledStdConv2d(4, 8, 3, padding=1),
    "ScaledStdConv2dSame": lambda: timm.layers.ScaledStdConv2dSame(4, 8, 3, stride=2),
    "Conv2dSame": lambda: timm.layers.Conv2dSame(4, 8, 3, stride=2),
    "Conv2dSame, grouped": lambda: timm.layers.Conv2dSame(4, 8, 5, stride=2, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 8, 4, 2, groups=2),
    "transposed, 1-d": lambda: nn.ConvTranspose1d(4, 8, 3, bias=False),
    "transposed, 3-d": lambda: nn.ConvTranspose3d(4, 8, 3),
}
FOLDED = {name for name in CONVS if "transposed" in name or "Conv2dSame" in name} - {
    "StdConv2dSame",
    "ScaledStdConv2dSame",
}
# Their kernel is computed ahead, and they become plain convs.
COMPUTED = {"own class", "StdConv2d", "ScaledStdConv2d"}


def net_of(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    conv = CONVS[name]()
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(conv.kernel_size)]
    return randomise_norms(nn.Sequential(conv, norm(8), nn.ReLU()).double()).eval()


def inputs(net: nn.Sequential) -> Tensor:
    rank = len(net[0].kernel_size)
    return torch.randn(2, 4, *(7,) * rank, dtype=torch.float64)


@pytest.mark.parametrize("name", CONVS)
def test_a_block_keeps_the_forward_of_the_conv(name: str) -> None:
    net = net_of(name)
    x = inputs(net)
    expanded = orepa.expand(net).eval()
    assert isinstance(expanded[0], OwnForwardConv)
    torch.testing.assert_close(expanded(x), net(x), rtol=1e-11, atol=1e-12)
    optimizer = torch.optim.SGD(expanded.parameters(), lr=0.1)
    before = expanded(x)
    expanded(x).square().mean().backward()
    assert all(p.grad is not None for p in expanded.parameters())
    optimizer.step()
    trained = expanded(x)
    assert (trained - before).abs().max() > 1e-6
    kept = orepa.collapse(expanded, fold_norm=False)
    assert type(kept[0]) is type(net[0])
    fresh = net_of(name)
    fresh.load_state_dict(kept.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), trained, rtol=1e-11, atol=1e-12)
    deploy = orepa.collapse(expanded)
    assert type(deploy[0]) is type(net[0])
    torch.testing.assert_close(deploy(x), trained, rtol=1e-11, atol=1e-12)
    assert is_batch_norm(deploy[1]) == (name not in FOLDED)


@pytest.mark.parametrize("name", CONVS)
def test_a_norm_is_folded_where_the_kernel_scales_the_output(name: str) -> None:
    net = net_of(name)
    deploy = orepa.collapse(net)
    x = inputs(net)
    torch.testing.assert_close(deploy(x), net(x), rtol=1e-11, atol=1e-12)
    assert is_batch_norm(deploy[1]) == (name not in FOLDED | COMPUTED)
    assert (type(deploy[0]) is nn.Conv2d) == (name in COMPUTED)


def test_parameters_of_the_forward_are_trained_and_kept() -> None:
    net = net_of("own class")
    expanded = orepa.expand(net)
    assert "0.conv.gain" in expanded.state_dict()
    assert not {"0.conv.weight", "0.conv.bias"} & expanded.state_dict().keys()
    with torch.no_grad():
        expanded.get_parameter("0.conv.gain").mul_(2)
    kept = orepa.collapse(expanded, fold_norm=False)
    torch.testing.assert_close(kept[0].gain, 2 * net[0].gain)


def test_the_block_can_be_copied_pickled_saved_and_compiled(tmp_path) -> None:
    net = net_of("StdConv2d")
    x = inputs(net)
    expanded = orepa.expand(net).eval()
    expected = expanded(x)
    for again in (copy.deepcopy(expanded), pickle.loads(pickle.dumps(expanded))):
        torch.testing.assert_close(again(x), expected)
    orepa.save(expanded, tmp_path / "net.safetensors")
    loaded = orepa.load(net_of("StdConv2d"), tmp_path / "net.safetensors").eval()
    torch.testing.assert_close(loaded(x), expected)
    compiled = torch.compile(expanded, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_no_norm_is_inserted_behind_a_forward_that_may_not_take_it_back() -> None:
    net = nn.Sequential(timm.layers.ScaledStdConv2d(4, 8, 3), nn.ReLU())
    expanded = orepa.expand(net)
    assert isinstance(expanded[0], OwnForwardConv)
    assert expanded[0].norm is None
    (edit,) = orepa.recorded_plans(expanded)[-1].of("expand").edits
    assert edit.note.startswith("the kernel goes into the forward of ScaledStdConv2d; |origin|")


def test_a_conv_with_several_kernels_is_named() -> None:
    class Patched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)
            self.conv.forward = lambda x: x  # type: ignore[method-assign]
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    (refusal,) = orepa.plan(Patched(), where="**").refusals
    assert refusal.reason == (
        "its forward was replaced on this one module, which a block could not call"
    )
