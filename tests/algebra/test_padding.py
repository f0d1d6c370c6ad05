"""Padding as an operator: exact at the border, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.algebra.operators import identity
from orepa_compiler.algebra.padding import padded_with_bias, padding_operator
from orepa_compiler.errors import NotLinear
from tests.convolution_reference import assert_same, reference
from tests.operator_factories import ONE, conv, image

PADS: dict[str, nn.Module] = {
    "zeros": nn.ZeroPad2d((1, 2, 3, 0)),
    "zeros, 1-d": nn.ZeroPad1d((1, 2)),
    "zeros, 3-d": nn.ZeroPad3d((1, 0, 0, 2, 1, 1)),
    "constant 0": nn.ConstantPad2d(2, 0.0),
    "cropped": nn.ZeroPad2d((-1, -2, 1, 0)),
    "reflect": nn.ReflectionPad2d((1, 2, 2, 0)),
    "replicate": nn.ReplicationPad2d(2),
    "replicate, 3-d": nn.ReplicationPad3d(1),
    "circular": nn.CircularPad2d((0, 1, 2, 1)),
}


@pytest.mark.parametrize("layer", PADS.values(), ids=PADS)
def test_a_padding_layer_is_an_operator(layer: nn.Module) -> None:
    op = conv_operator(layer, 4)
    x = image(op.rank, 7)
    assert_same(reference(op, x), layer(x))
    assert op.groups == 4
    outer = conv(*(3,) * op.rank, seed=1)
    assert_same(reference(outer @ op, x), reference(outer, layer(x)))


def test_padding_with_a_number_is_refused() -> None:
    with pytest.raises(NotLinear) as caught:
        conv_operator(nn.ConstantPad2d(1, 0.5), 4)
    assert caught.value.reason == (
        "border: it pads with 0.5; a conv pads with zeros, or with the bias of the one before it"
    )


def test_padding_needs_a_width_and_axes() -> None:
    with pytest.raises(NotLinear) as caught:
        conv_operator(nn.ZeroPad2d(1))
    assert caught.value.reason == "the number of channels that ZeroPad2d sees is not known"
    with pytest.raises(NotLinear) as caught:
        padding_operator(identity(4, 1, like=ONE), ((1, 1), (1, 1)), "constant", 0.0)
    assert caught.value.reason == "padding of 2 axes reaches beyond the 1 of a map"


def test_padding_of_the_last_axes_leaves_the_others() -> None:
    op = padding_operator(identity(4, 2, like=ONE), ((1, 2),), "constant", 0.0)
    assert op.padding == ((0, 0), (1, 2))


def test_a_subclass_with_a_forward_of_its_own_is_refused() -> None:
    class Odd(nn.ZeroPad2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(NotLinear, match="Odd has a forward of its own"):
        conv_operator(Odd(1), 4)


@given(
    rank=st.integers(1, 3),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_padded_with_its_bias(
    rank: int, before: int, after: int, groups: int, bias: bool, seed: int
) -> None:
    """pad_b(W x + b) = W pad_0(x) + b."""
    inner = conv(*(1,) * rank, groups=groups, bias=bias, seed=seed)
    zeros = padding_operator(identity(4, rank, like=ONE), ((before, after),) * rank, "zeros", 0.0)
    x = image(rank, 5)
    y = reference(inner, x)
    shift = 0.0 if inner.bias is None else inner.bias.reshape(-1, *(1,) * rank)
    expected = F.pad(y - shift, (before, after) * rank) + shift
    padded = padded_with_bias(inner, zeros)
    assert_same(reference(padded, x), expected)
    outer = conv(*(2,) * rank, seed=seed + 1)
    assert_same(reference(outer @ padded, x), reference(outer, expected))


def test_a_kernel_that_is_not_pointwise_cannot_be_padded_with_its_bias() -> None:
    zeros = padding_operator(identity(4, 2, like=ONE), ((1, 1), (1, 1)), "zeros", 0.0)
    with pytest.raises(NotLinear, match="border: padding \\(1, 1\\) before the second conv cuts"):
        padded_with_bias(conv(3, 3), zeros)
