"""What a block says of itself: the conv that it is, and no place to write one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import orepa_compiler as orepa
from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.blocks import ConvBlock, LinearBlock, inserted_norm, squeezed
from orepa_compiler.blocks.catalogue import OREPA, OREPA_VGG
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.errors import ReparamError
from tests.convolution_reference import assert_same
from tests.norms import randomise_norms


def block(bias: bool, *, norm: bool = False, cls: type[ConvBlock] = LinearBlock) -> Any:
    """A block in eval mode, with norms that have seen values."""
    layer = nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=bias).double()
    behind = inserted_norm(conv_operator(layer), layer.weight) if norm else None
    kind = OREPA_VGG if cls is OfflineBlock else OREPA
    made = cls(layer, kind, norm=behind)
    return randomise_norms(made).eval()


def said(made: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, made.weight, made.bias, made.stride, made.padding)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("cls", [LinearBlock, OfflineBlock])
def test_weight_and_bias_are_those_of_the_conv_that_it_is(bias: bool, norm: bool, cls: Any) -> None:
    made = block(bias, norm=norm, cls=cls)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert_same(said(made, x), made(x))
    if cls is LinearBlock:
        assert_same(said(squeezed(made), x), made(x))


def test_what_is_said_has_the_gradients_of_the_block() -> None:
    made = block(True, norm=True)
    (made.weight.square().sum() + made.bias.sum()).backward()
    assert all(p.grad is not None for p in made.parameters())
    assert type(made.weight * 1) is Tensor


def test_the_bias_is_the_parameter_where_nothing_adds_to_it() -> None:
    made = block(True)
    assert made.bias is made._parameters["bias"]
    made.bias = nn.Parameter(torch.ones(6, dtype=torch.float64))
    assert made.bias is made._parameters["bias"]
    assert float(made.bias.sum().detach()) == 6


def write_data(made: Any) -> None:
    made.weight.data = torch.zeros_like(made.weight)


def write_in_place(made: Any) -> None:
    with torch.no_grad():
        made.weight.mul_(2)


def write_into_the_data(made: Any) -> None:
    made.weight.data[0] = 0


def write_by_out(made: Any) -> None:
    torch.zeros(6, dtype=torch.float64, out=made.bias)


def give_a_parameter(made: Any) -> None:
    made.weight = nn.Parameter(torch.zeros(6, 4, 3, 3))


def give_a_tensor(made: Any) -> None:
    made.weight = torch.zeros(6, 4, 3, 3)


def give_a_bias(made: Any) -> None:
    made.register_parameter("bias", nn.Parameter(torch.zeros(6)))


def fuse_by_torch(made: Any) -> None:
    nn.utils.fusion.fuse_conv_bn_eval(made, nn.BatchNorm2d(6).double().eval())


@pytest.mark.parametrize(
    "fuse",
    [
        write_data, write_in_place, write_into_the_data, write_by_out, give_a_parameter,
        give_a_tensor, give_a_bias, fuse_by_torch,
    ],
)  # fmt: skip
def test_what_would_be_lost_says_to_collapse_first(fuse: Any) -> None:
    made = block(False, norm=True)
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ReparamError, match=r"of a block is made .* call orepa.collapse\(model\)"):
        fuse(made)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_pruned_bias_is_added() -> None:
    made = block(True)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    prune.l1_unstructured(made, "bias", amount=3)  # type: ignore[no-untyped-call]
    assert int((made.own_bias() == 0).sum()) == 3
    assert_same(said(made, x), made(x))


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_tracer_of_fx_calls_a_block_as_it_calls_a_conv(cls: Any) -> None:
    net = nn.Sequential(cls(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    big = randomise_norms(orepa.expand(net.double(), inputs=x, block=OREPA)).eval()
    traced = torch.fx.symbolic_trace(big)
    assert [str(n.target) for n in traced.graph.nodes if n.op == "call_module"] == list("0123")
    assert isinstance(traced.get_submodule("0"), ConvBlock)
    assert_same(traced(x), big(x))


def test_a_block_by_itself_is_not_traced() -> None:
    for made in (block(True), squeezed(block(True))):
        with pytest.raises(ReparamError, match=r"cannot trace a block by itself; trace the model"):
            torch.fx.symbolic_trace(made)
