"""ConvOperator as a value: its shape, its other forms, and that no rule looks at its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from operator import add, matmul

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.errors import NotLinear
from tests.convolution_reference import assert_same, reference
from tests.operator_factories import (
    GRID,
    NAMES,
    ONE,
    beside,
    conv,
    image,
    images,
    random_tensor,
    structure,
)

Combine = Callable[[ConvOperator, ConvOperator], ConvOperator]

# torch says so once of any even kernel with padding="same"; the operator itself never pads so.
EVEN_SAME = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def test_what_is_left_out_is_one_stride_one_dilation_and_no_padding() -> None:
    op = ConvOperator(torch.zeros(6, 2, 3, 5))
    assert (op.stride, op.padding, op.dilation) == ((1, 1), ((0, 0), (0, 0)), (1, 1))
    assert (op.groups, op.padding_mode, op.bias) == (1, "zeros", None)


def test_its_shape() -> None:
    op = conv(3, 2, channels=(4, 6), groups=2, dilation=[2, 3], padding=[(0, 1), -1])
    assert (op.rank, op.kernel_size, op.extent) == (2, (3, 2), (5, 4))
    assert (op.in_channels, op.out_channels, op.macs) == (4, 6, 6 * 2 * 3 * 2)
    assert op.has_padding
    assert repr(op) == (
        "ConvOperator(4 -> 6, 3x2, stride=(1, 1), padding=((0, 1), (-1, -1)), dilation=(2, 3), "
        "groups=2, bias=True)"
    )
    assert repr(conv()).startswith("ConvOperator(4 -> 4, linear, ")


def test_it_is_a_frozen_value_and_its_fields_fit_its_kernel() -> None:
    with pytest.raises(FrozenInstanceError):
        conv(3).groups = 2  # type: ignore[misc]
    with pytest.raises(AssertionError, match=r"stride \(1, 1\) does not fit a kernel with 1 axes"):
        ConvOperator(torch.zeros(1, 1, 3), stride=(1, 1))


def test_pointwise_is_one_tap_at_its_own_place() -> None:
    assert all(op.is_pointwise for op in (conv(), conv(1, 1, dilation=2), identity(4, 3, like=ONE)))
    others = [conv(3, 1), conv(1, stride=2), conv(1, padding=1), conv(1, padding=[(1, -1)])]
    assert not any(op.is_pointwise for op in others)


def test_only_padding_that_adds_pixels_is_padding() -> None:
    assert conv(3, padding=[(-1, 1)]).has_padding
    assert not conv(3, padding=-1).has_padding
    assert not conv().has_padding


@pytest.mark.parametrize("rank", range(4))
def test_the_identity_gives_its_input_back(rank: int) -> None:
    one = identity(4, rank, like=ONE)
    assert (one.groups, one.weight.dtype) == (4, torch.float64)
    assert torch.equal(one(image(rank, 3)), image(rank, 3))


def test_another_precision_and_another_bias() -> None:
    half = conv(3).to(torch.float16)
    assert half.bias is not None
    assert (half.weight.dtype, half.bias.dtype) == (torch.float16, torch.float16)
    meta = conv(3, bias=False).to(torch.float32, torch.device("meta"))
    assert (meta.weight.is_meta, meta.weight.dtype, meta.bias) == (True, torch.float32, None)
    bias = random_tensor(4)
    assert conv(3).with_bias(bias).bias is bias
    assert conv(3).with_bias(None).bias is None


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_a_broken_weight_does_not_spread_beyond_its_group(broken: float) -> None:
    op = conv(3, padding=1, groups=2)
    weight = op.weight.clone()
    weight[:2] = broken
    one = replace(op, weight=weight).regroup(1)
    assert_same(one(image(1, 7))[:, 2:], op(image(1, 7))[:, 2:])
    assert one.weight[:2, 2:].count_nonzero() == 0


def outcome(combine: Combine, left: ConvOperator, right: ConvOperator) -> object:
    """What an expression gives, without its values: a structure, or the words of a refusal."""
    try:
        return structure(combine(left, right))
    except NotLinear as reason:
        return str(reason)


def on_meta(op: ConvOperator) -> ConvOperator:
    return op.to(op.weight.dtype, torch.device("meta"))


def broken(op: ConvOperator) -> ConvOperator:
    bias = None if op.bias is None else torch.full_like(op.bias, torch.nan)
    return replace(op, weight=torch.full_like(op.weight, torch.nan), bias=bias)


@EVEN_SAME
@pytest.mark.parametrize("change", [on_meta, broken])
@NAMES
def test_no_rule_looks_at_a_value(
    name: str, change: Callable[[ConvOperator], ConvOperator]
) -> None:
    op = GRID[name]
    for inner in (other for other in GRID.values() if other.rank == op.rank):
        changed, other = change(op), change(inner)
        for combine in (add, matmul):
            assert outcome(combine, changed, other) == outcome(combine, op, inner)
    side = beside(op, 2, dilation=2, shift=1)
    total, changed = op + side, change(op) + change(side)
    assert structure(changed) == structure(total)
    x = images(op)[0].to(changed.weight.device)
    assert changed(x).shape == total(images(op)[0]).shape == changed.to_module()(x).shape
    assert changed.to_module().weight.device == changed.weight.device
    factor = random_tensor(4).to(changed.weight.device)
    assert structure(changed.scale(factor).regroup(1)) == structure(total.regroup(1))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_plain_conv_keeps_its_form_as_a_module(rank: int) -> None:
    op = conv(*(3,) * rank, stride=2, padding=2, dilation=2, groups=2, mode="replicate")
    module = op.to_module()
    assert type(module) is (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    assert (module.kernel_size, module.stride, module.dilation) == ((3,) * rank, *[(2,) * rank] * 2)
    assert (module.padding, module.groups, module.padding_mode) == ((2,) * rank, 2, "replicate")
    assert (module.in_channels, module.out_channels) == (4, 4)
    assert torch.equal(module.weight, op.weight)


def test_no_kernel_axes_make_a_linear_layer() -> None:
    module = conv(channels=(4, 6), groups=2, bias=False).to_module()
    assert type(module) is nn.Linear
    assert (module.in_features, module.out_features, module.bias) == (4, 6, None)
    x = random_tensor(2, 7, 4)
    expected = F.conv1d(x.transpose(1, 2), conv(1, channels=(4, 6), groups=2).weight, groups=2)
    assert_same(module(x), expected.transpose(1, 2))


@EVEN_SAME
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_that_a_module_can_only_call_same(mode: str) -> None:
    op = conv(4, 2, padding=[(1, 2), (0, 1)], mode=mode)
    module = op.to_module()
    assert (module.padding, module.kernel_size) == ("same", (4, 2))
    assert_same(module(image(2, 9)), reference(op, image(2, 9)))
    assert conv(2, padding=[(1, 0)]).to_module().padding == (1,)
    assert conv(2, stride=2, padding=[(0, 1)]).to_module().padding == (1,)
    assert conv(3, 5, padding=[1, 2]).to_module().padding == (1, 2)


@pytest.mark.parametrize(
    ("op", "kernel_size", "padding", "dilation"),
    [
        (conv(3, padding=[(2, 0)]), (5,), (2,), (1,)),
        (conv(3, padding=[(0, 3)], stride=2), (6,), (3,), (1,)),
        (conv(3, padding=-1), (5,), (0,), (1,)),
        (conv(3, padding=[(-1, 2)], stride=3), (6,), (2,), (1,)),
        (conv(3, padding=[(4, 0)], dilation=2), (5,), (4,), (2,)),
        (conv(3, padding=[(3, 0)], dilation=2), (8,), (3,), (1,)),
        (conv(1, padding=[(4, -2)]), (2,), (4,), (6,)),
    ],
)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_other_padding_becomes_zero_taps(
    op: ConvOperator,
    kernel_size: tuple[int],
    padding: tuple[int],
    dilation: tuple[int],
    mode: str,
) -> None:
    op = replace(op, padding_mode=mode)
    module = op.to_module()
    assert (module.kernel_size, module.padding, module.dilation) == (kernel_size, padding, dilation)
    assert module.padding_mode == mode
    for size in (14, 15, 16):
        assert_same(module(image(1, size)), reference(op, image(1, size)))


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_module_owns_plain_parameters(kernel: tuple[int, ...]) -> None:
    weight = random_tensor(4, 4, *kernel).transpose(0, 1).requires_grad_()
    bias = random_tensor(8)[::2].requires_grad_()
    op = ConvOperator(weight, bias).scale(torch.ones(1, dtype=torch.float64))
    for source in (op, ConvOperator(weight, bias), ConvOperator(weight.contiguous(), bias)):
        module = source.to_module()
        for ours, theirs in [(module.weight, source.weight), (module.bias, source.bias)]:
            assert isinstance(ours, nn.Parameter)
            assert theirs is not None
            assert ours.is_leaf
            assert ours.requires_grad
            assert ours.is_contiguous()
            assert ours.dtype == torch.float64
            assert torch.equal(ours, theirs)
            assert ours.data_ptr() != theirs.data_ptr()
        assert set(dict(module.named_parameters())) == {"weight", "bias"}


def test_gradients_do_not_flow_into_a_module() -> None:
    weight = random_tensor(4, 4, 3).requires_grad_()
    ConvOperator(weight).to_module()(image(1, 5)).sum().backward()
    assert weight.grad is None


def test_it_computes_on_unbatched_input_too() -> None:
    x: Tensor = image(2, 8)
    for op in (GRID["2d-2x3-circular"], GRID["2d-4x2-same"], GRID["2d-3-p1"]):
        assert_same(op(x[0]), op(x)[0])
