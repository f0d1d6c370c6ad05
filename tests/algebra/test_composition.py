"""Which sequences and sums are one convolution, and which are refused, with the words used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.errors import NotLinear
from tests.convolution_reference import CLEARLY_WRONG, assert_same, error, reference
from tests.operator_factories import (
    ONE,
    Pair,
    conv,
    image,
    images,
    interior,
    naive,
    random_tensor,
)

X = image(2, 11)

POINT, POINT_NO_BIAS = conv(1, 1, seed=1), conv(1, 1, bias=False, seed=2)
VALID, PADDED = conv(3, 3, seed=3), conv(3, 3, padding=1, seed=3)
SHIFT = random_tensor(4, seed=5)
AFFINE = identity(4, 2, like=ONE).scale(random_tensor(4, seed=6)).with_bias(SHIFT)
POOL = ConvOperator(torch.full((4, 1, 3, 3), 1 / 9, dtype=ONE.dtype), None, groups=4)
POOL = replace(POOL, padding=((1, 1), (1, 1)))


def padded(mode: str, size: int) -> ConvOperator:
    return conv(size, size, padding=size // 2, mode=mode, seed=size)


EXACT = {
    "1x1 without bias -> 3x3 padded": (PADDED, POINT_NO_BIAS),
    "3x3 padded -> 1x1": (POINT, PADDED),
    "3x3 padded -> norm": (AFFINE, PADDED),
    "all padding on the first": (VALID, conv(3, 3, padding=2)),
    "all padding on the first, with a stride": (VALID, conv(3, 3, padding=2, stride=2)),
    "circular 3x3 -> circular 5x5": (padded("circular", 5), padded("circular", 3)),
    "1x1 -> circular 3x3": (padded("circular", 3), POINT),
    "1x1 -> reflect 3x3": (padded("reflect", 3), POINT),
    "1x1 -> replicate 3x3": (padded("replicate", 3), POINT),
    "1x1 -> average pool": (POOL, POINT_NO_BIAS),
    "norm -> unpadded 3x3": (VALID, AFFINE),
    "depthwise -> 1x1": (POINT, conv(3, 3, padding=1, groups=4)),
}

REFUSED = {
    "1x1 with bias -> 3x3 padded": (PADDED, POINT),
    "3x3 padded -> 3x3 padded": (PADDED, PADDED),
    "3x3 -> 3x3 padded": (PADDED, conv(3, 3, bias=False)),
    "reflect 3x3 -> reflect 3x3": (padded("reflect", 3), padded("reflect", 3)),
    "replicate 3x3 -> replicate 3x3": (padded("replicate", 3), padded("replicate", 3)),
    "reflect 1x1 with a stride": (padded("reflect", 3), conv(1, 1, stride=2)),
    "circular 3x3 -> padded with zeros": (PADDED, padded("circular", 3)),
    "unpadded 3x3 -> circular 3x3": (padded("circular", 3), VALID),
    "circular 3x3 with a stride": (
        padded("circular", 3),
        conv(3, 3, stride=2, padding=1, mode="circular"),
    ),
    "norm -> 3x3 padded": (PADDED, AFFINE),
}


@pytest.mark.parametrize(("outer", "inner"), EXACT.values(), ids=EXACT)
def test_sequences_that_are_one_conv(outer: ConvOperator, inner: ConvOperator) -> None:
    for x in images(inner):
        assert_same((outer @ inner)(x), reference(outer, reference(inner, x)))


@pytest.mark.parametrize(("outer", "inner"), REFUSED.values(), ids=REFUSED)
def test_sequences_that_differ_at_the_border(outer: ConvOperator, inner: ConvOperator) -> None:
    with pytest.raises(NotLinear, match=r"^(border: |a conv padded with '\w+' after one)"):
        outer @ inner
    for mode in {op.padding_mode for op in (outer, inner) if op.has_padding}:
        composed = naive(outer, inner, mode)
        assert max(error(composed(x), outer(inner(x))) for x in images(inner)) > CLEARLY_WRONG
    composed = naive(outer, inner, (inner if inner.has_padding else outer).padding_mode)
    ys = [interior(outer, inner(X), y) for y in (composed(X), outer(inner(X)))]
    assert_same(*ys)


def pad_with(x: Tensor, values: Tensor) -> Tensor:
    """x with one pixel more on each side, of a value for each channel."""
    return F.pad(x - values.reshape(-1, 1, 1), (1, 1, 1, 1)) + values.reshape(-1, 1, 1)


def test_padding_with_the_bias_is_padding_before_the_1x1() -> None:
    assert POINT.bias is not None
    composed = VALID @ replace(POINT, padding=PADDED.padding)
    assert_same(composed(X), VALID(pad_with(POINT(X), POINT.bias)))
    assert_same(composed(X), VALID(POINT(F.pad(X, (1, 1, 1, 1)))))


def test_a_norm_before_a_padded_conv_is_exact_on_input_padded_with_what_it_maps_to_zero() -> None:
    unknown = -SHIFT / AFFINE.weight.flatten()
    assert_same((VALID @ AFFINE)(pad_with(X, unknown)), PADDED(AFFINE(X)))


def test_an_average_pool_is_a_conv_only_where_it_counts_its_padding() -> None:
    assert_same((POOL @ POINT_NO_BIAS)(X), F.avg_pool2d(POINT_NO_BIAS(X), 3, 1, 1))
    other = F.avg_pool2d(X, 3, 1, 1, count_include_pad=False)
    assert error(POOL(X), other) > CLEARLY_WRONG
    assert_same(interior(POOL, X, POOL(X)), interior(POOL, X, other))


@pytest.mark.parametrize(
    ("outer", "inner", "groups"),
    [
        (conv(3, 3, groups=2), conv(3, 3, groups=2), 2),
        (conv(1, 1, groups=4), conv(3, 3, groups=4), 4),
        (conv(1, 1, channels=(32, 4)), conv(3, 3, channels=(4, 32), groups=4), 1),
        (conv(1, 1, channels=(32, 4), groups=2), conv(3, 3, channels=(4, 32), groups=4), 2),
    ],
)
def test_groups_are_kept_where_they_can_be(
    outer: ConvOperator, inner: ConvOperator, groups: int
) -> None:
    composed = outer @ inner
    assert composed.groups == groups
    assert composed.weight.shape[:2] == (4, 4 // groups)
    assert_same(composed(X), outer(inner(X)))


@pytest.mark.parametrize(
    ("outer", "inner", "kernel_size", "dilation"),
    [
        (conv(3, 3, dilation=2), conv(3, 3, dilation=4), (7, 7), (2, 2)),
        (conv(3, 3, dilation=3), conv(2, 1, dilation=2), (9, 3), (1, 3)),
        (VALID, conv(1, 1, stride=2), (3, 3), (2, 2)),
        (VALID, conv(2, 2, stride=2, dilation=4), (5, 5), (2, 2)),
    ],
)
def test_taps_stay_as_far_apart_as_they_can(
    outer: ConvOperator, inner: ConvOperator, kernel_size: Pair, dilation: Pair
) -> None:
    composed = outer @ inner
    assert (composed.kernel_size, composed.dilation) == (kernel_size, dilation)
    assert_same(composed(image(2, 16)), outer(inner(image(2, 16))))


SUMS = {
    "4x4 stride 2 + 1x1 stride 2": (
        [conv(4, 4, stride=2, padding=1), conv(1, 1, stride=2)],
        ((4, 4), ((1, 1), (1, 1)), (1, 1)),
    ),
    "3x3 + 1x3 + 3x1": (
        [PADDED, conv(1, 3, padding=[0, 1]), conv(3, 1, padding=[1, 0])],
        ((3, 3), ((1, 1), (1, 1)), (1, 1)),
    ),
    "3x3 unpadded + 1x3 and 3x1 that crop": (
        [VALID, conv(1, 3, padding=[-1, 0]), conv(3, 1, padding=[0, -1])],
        ((3, 3), ((0, 0), (0, 0)), (1, 1)),
    ),
    "7x7 + 3x3 dilated by 3": (
        [conv(7, 7, padding=3, groups=4), conv(3, 3, padding=3, dilation=3, groups=4)],
        ((7, 7), ((3, 3), (3, 3)), (1, 1)),
    ),
    "3x3 dilated by 2 + 1x1 + identity": (
        [conv(3, 3, padding=2, dilation=2), POINT, identity(4, 2, like=ONE)],
        ((3, 3), ((2, 2), (2, 2)), (2, 2)),
    ),
    "3x3 dilated by 2 + by 4": (
        [conv(3, 3, padding=2, dilation=2), conv(3, 3, padding=4, dilation=4)],
        ((5, 5), ((4, 4), (4, 4)), (2, 2)),
    ),
    "2x2 that looks ahead + 2x2 that looks back": (
        [conv(2, 2, padding=[(0, 1), (0, 1)]), conv(2, 2, padding=[(1, 0), (1, 0)])],
        ((3, 3), ((1, 1), (1, 1)), (1, 1)),
    ),
    "reflect 5x5 + reflect 3x3 + 1x1": (
        [padded("reflect", 5), padded("reflect", 3), POINT],
        ((5, 5), ((2, 2), (2, 2)), (1, 1)),
    ),
}


@pytest.mark.parametrize(("branches", "expected"), SUMS.values(), ids=SUMS)
def test_parallel_branches(branches: list[ConvOperator], expected: tuple[object, ...]) -> None:
    total = sum(branches[1:], start=branches[0])
    assert (total.kernel_size, total.padding, total.dilation) == expected
    x = image(2, 12)
    assert_same(total(x), torch.stack([reference(op, x) for op in branches]).sum(0))


BORDER = "border: padding (1, 1) before the second conv cuts off what the first one"
WORDS: dict[str, tuple[Callable[[], ConvOperator], str]] = {
    "channels of a sum": (
        lambda: conv(3) + conv(3, channels=(4, 8)),
        "cannot add convs of 4 -> 4 and 4 -> 8 channels",
    ),
    "strides": (
        lambda: conv(3, stride=2) + conv(3),
        "cannot add strides (2,) and (1,); branches of one block must share a stride",
    ),
    "sizes": (
        lambda: conv(3, 3, padding=[1, 0]) + conv(3, 3, padding=[1, 2]),
        "cannot add outputs that differ by 4 pixels on axis 1: kernels (3, 3) and (3, 3), "
        "paddings ((1, 1), (0, 0)) and ((1, 1), (2, 2))",
    ),
    "sizes after a stride": (
        lambda: conv(3, stride=2) + conv(3, stride=2, padding=1),
        "cannot add outputs that differ by 1 pixels on axis 0: kernels (3,) and (3,), "
        "paddings ((0, 0),) and ((1, 1),)",
    ),
    "padding modes of a sum": (
        lambda: PADDED + padded("reflect", 5),
        "cannot join paddings 'zeros' and 'reflect': they see different values beyond the border",
    ),
    "channels of a sequence": (
        lambda: conv(3, channels=(8, 4)) @ conv(3),
        "a conv that reads 8 channels cannot follow one that gives 4",
    ),
    "ranks": (lambda: conv(3, 3) + conv(3), "a layer for 2-d maps cannot meet one for 1-d maps"),
    "border": (
        lambda: PADDED @ VALID,
        f"{BORDER} (kernel (3, 3)) gives beyond the border; put all the padding on the first conv",
    ),
    "bias": (
        lambda: PADDED @ POINT,
        "border: the first conv has a bias, so what it gives beyond the border is the bias and not "
        "the zeros that padding (1, 1) puts there; pad with that bias, or put the padding on the "
        "first conv",
    ),
    "stride": (
        lambda: padded("replicate", 3) @ conv(1, 1, stride=2),
        "border: 'replicate' padding after stride 2 is not the stride of the padded input",
    ),
    "padding modes of a sequence": (
        lambda: padded("reflect", 3) @ PADDED,
        "a conv padded with 'reflect' after one padded with 'zeros': one conv has one padding mode",
    ),
}


@pytest.mark.parametrize(("compute", "message"), WORDS.values(), ids=WORDS)
def test_a_refusal_gives_its_reason(compute: Callable[[], ConvOperator], message: str) -> None:
    with pytest.raises(NotLinear) as caught:
        compute()
    assert str(caught.value) == message


def test_refused_sums_have_no_conv_to_be() -> None:
    x = image(1, 12)
    for left, right in [(conv(3), conv(3, stride=2)), (conv(3), conv(3, padding=1))]:
        assert left(x).shape != right(x).shape
    zeros, reflect = PADDED, padded("reflect", 5)
    expected = zeros(X) + reflect(X)
    for mode in ("zeros", "reflect"):
        total = replace(zeros, padding_mode=mode) + replace(reflect, padding_mode=mode)
        assert error(total(X), expected) > CLEARLY_WRONG
        assert_same(interior(reflect, X, total(X)), interior(reflect, X, expected))
