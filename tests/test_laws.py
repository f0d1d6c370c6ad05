"""The laws of the algebra, over a grid of geometries and at random, in float64."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product
from math import gcd

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.errors import NotLinear
from tests.convolution_reference import CLEARLY_WRONG, TOLERANCE, assert_same, error, reference
from tests.operator_factories import (
    EVERY,
    GRID,
    NAMES,
    REFUSED_THOUGH_EXACT,
    attempt,
    beside,
    conv,
    image,
    images,
    interior,
    naive,
    operators,
    random_tensor,
    roomy_image,
    structure,
)

fuzz = settings(max_examples=60)


@EVERY
def test_a_call_is_the_definition_of_a_convolution(op: ConvOperator) -> None:
    for x in images(op):
        assert_same(op(x), reference(op, x))


@NAMES
def test_a_sequence_is_exact_or_it_is_refused(name: str) -> None:
    outer = GRID[name]
    refused_though_exact = []
    for first, inner in GRID.items():
        if inner.rank != outer.rank:
            continue
        composed = attempt(outer, inner)
        if composed is not None:
            for x in images(inner):
                assert_same(composed(x), outer(inner(x)), first)
        elif is_exact_at_the_border(outer, inner):
            refused_though_exact.append(first)
    assert sorted(refused_though_exact) == sorted(REFUSED_THOUGH_EXACT.get(name, []))


def is_exact_at_the_border(outer: ConvOperator, inner: ConvOperator) -> bool:
    """Whether the composition, were it not refused, is exact there too; elsewhere it must be."""
    mode = inner.padding_mode if inner.has_padding else outer.padding_mode
    for x in images(inner):
        between = inner(x)
        results = (naive(outer, inner, mode)(x), outer(between))
        assert_same(*(interior(outer, between, y) for y in results), "interior", inner)
    errors = [
        max(error(naive(outer, inner, op.padding_mode)(x), outer(inner(x))) for x in images(inner))
        for op in (outer, inner)
        if op.has_padding
    ]
    assert min(errors) < TOLERANCE or min(errors) > CLEARLY_WRONG
    return min(errors) < TOLERANCE


@fuzz
@given(st.data(), st.sampled_from([1, 1, 2]))
def test_a_random_sequence_that_is_accepted_is_exact(data: st.DataObject, rank: int) -> None:
    width, middle, out = (data.draw(st.sampled_from([4, 6, 12])) for _ in range(3))
    inner = data.draw(operators(rank, (width, middle)))
    outer = data.draw(operators(rank, (middle, out)))
    composed = attempt(outer, inner)
    assume(composed is not None)
    assert composed is not None
    x = roomy_image(composed, data.draw(st.integers(9, 14)))
    assert_same(composed(x), reference(outer, reference(inner, x)))


@fuzz
@given(st.data())
def test_composition_is_associative(data: st.DataObject) -> None:
    a, b = (data.draw(operators(1, (12, 12), padded=False)) for _ in range(2))
    c = data.draw(operators(1, (12, 12)))
    assert structure((a @ b) @ c) == structure(a @ (b @ c))
    x = roomy_image(a @ b @ c)
    assert_same(((a @ b) @ c)(x), a(b(c(x))))
    assert_same((a @ (b @ c))(x), a(b(c(x))))


@pytest.mark.parametrize(
    "names",
    [
        ("1d-1", "1d-3-p1", "1d-1-nobias"),
        ("1d-3-crop", "1d-3-s2-p1", "1d-1-s2-nobias"),
        ("1d-3-s2-p1-circular", "1d-4-shift-circular", "1d-3-p1-circular"),
        ("1d-1-s2-replicate", "1d-3-p1-replicate", "1d-1"),
        ("2d-1-s2-nobias", "2d-3-depthwise", "2d-3-p1-reflect"),
        ("3d-1", "3d-1x2x3", "3d-1"),
    ],
)
def test_composition_with_padding_is_associative(names: tuple[str, str, str]) -> None:
    a, b, c = (GRID[name] for name in names)
    assert structure((a @ b) @ c) == structure(a @ (b @ c))
    for x in images(c):
        assert_same(((a @ b) @ c)(x), a(b(c(x))))
        assert_same((a @ (b @ c))(x), a(b(c(x))))


def test_a_crop_makes_one_bracketing_exact_and_the_other_not() -> None:
    crop, padded, first = conv(3, padding=-2), conv(3, padding=1), conv(3)
    x = image(1, 12)
    assert attempt(padded, first) is None
    assert_same(((crop @ padded) @ first)(x), crop(padded(first(x))))


@EVERY
def test_a_sum_is_both_side_by_side(op: ConvOperator) -> None:
    for kernel, dilation, shift in [(1, 1, 0), (1, 1, 1), (2, 1, -1), (3, 2, 0), (3, 3, 2)]:
        other = beside(op, kernel, dilation=dilation, shift=shift, groups=2)
        for x in images(op):
            assert_same((op + other)(x), op(x) + other(x), other)
            assert_same((other + op)(x), op(x) + other(x), other)


@fuzz
@given(st.data(), st.sampled_from([1, 1, 2]))
def test_a_random_sum_is_both_side_by_side(data: st.DataObject, rank: int) -> None:
    op = data.draw(operators(rank, (6, 12)))
    kernel, dilation = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    shift, groups = data.draw(st.integers(-3, 3)), data.draw(st.sampled_from([1, 2, 3, 6]))
    other = beside(op, kernel, dilation=dilation, shift=shift, groups=groups)
    x = roomy_image(op + other, data.draw(st.integers(9, 14)))
    assert_same((op + other)(x), reference(op, x) + reference(other, x))


def is_divisible(x: Tensor, op: ConvOperator) -> bool:
    return not any(size % s for size, s in zip(x.shape[2:], op.stride, strict=True))


@NAMES
def test_a_sum_is_exact_for_inputs_divisible_by_the_stride_or_it_is_refused(name: str) -> None:
    op = GRID[name]
    for longer in range(-4, 5):
        other = beside(op, 3, longer=longer)
        try:
            both = op + other
        except NotLinear:
            xs = [x for x in images(op) if is_divisible(x, op)]
            assert xs
            assert all(op(x).shape != other(x).shape for x in xs)
            continue
        for x in images(op):
            # Of other sizes, those are exact on which there is a sum at all.
            if is_divisible(x, op) or op(x).shape == other(x).shape:
                assert_same(both(x), op(x) + other(x), longer)


@pytest.mark.parametrize(("one", "two"), list(product([1, 2, 3, 4, 6, 12], repeat=2)))
def test_groups_of_any_two_sizes(one: int, two: int) -> None:
    x = image(1, 9, channels=12)
    for k1, k2 in [(1, 1), (1, 3), (3, 1), (2, 3)]:
        inner = conv(k1, channels=(12, 24), groups=one, seed=1)
        outer = conv(k2, channels=(24, 12), groups=two, seed=2)
        side = conv(k1, channels=(12, 24), groups=two, seed=3)
        assert_same((outer @ inner)(x), outer(inner(x)), k1, k2)
        assert_same((inner + side)(x), inner(x) + side(x), k1)
        assert (outer @ inner).groups == (inner + side).groups == gcd(one, two)


@EVERY
def test_composition_distributes_over_the_sum(op: ConvOperator) -> None:
    other = beside(op, 2, dilation=2, shift=1, seed=60)
    before = conv(*(1,) * op.rank, bias=False, groups=2, seed=61)
    after = conv(*(2,) * op.rank, stride=2, dilation=2, groups=4, seed=62)
    both = op + other
    for x in images(op):
        assert_same((both @ before)(x), op(before(x)) + other(before(x)))
        assert_same((op @ before + other @ before)(x), (both @ before)(x))
        assert_same((after.with_bias(None) @ both)(x), after.with_bias(None)(op(x) + other(x)))
        halves = after.with_bias(None) @ op + after @ other
        assert_same(halves(x), (after @ both)(x))


@EVERY
def test_unpadded_composition_distributes_with_any_first_conv(op: ConvOperator) -> None:
    op = replace(op, padding=())
    other, first = beside(op, 1), conv(*(2,) * op.rank, stride=2, groups=4, seed=63)
    for x in (image(op.rank, 22), image(op.rank, 25)):
        expected = op(first(x)) + other(first(x))
        assert_same(((op + other) @ first)(x), expected)
        assert_same((op @ first + other @ first)(x), expected)


@EVERY
def test_a_scaling_layer(op: ConvOperator) -> None:
    factor, x = random_tensor(4, seed=70), images(op)[0]
    column = factor.reshape(-1, *(1,) * op.rank)
    other, after = beside(op, 3), conv(*(3,) * op.rank, groups=2, seed=71)
    assert_same(op.scale(factor)(x), column * op(x))
    assert_same(op.scale(factor[:1])(x), factor[0] * op(x))
    assert_same((op + other).scale(factor)(x), (op.scale(factor) + other.scale(factor))(x))
    assert_same((after @ op).scale(factor)(x), (after.scale(factor) @ op)(x))
    assert_same((after @ op.scale(factor))(x), after(column * op(x)))


@EVERY
def test_other_forms_compute_the_same(op: ConvOperator) -> None:
    for groups in (g for g in (1, 2, 4) if op.groups % g == 0):
        assert op.regroup(groups).groups == groups
        assert_same(op.regroup(groups)(images(op)[0]), op(images(op)[0]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        for x in images(op):
            assert_same(op.to_module()(x), op(x))
