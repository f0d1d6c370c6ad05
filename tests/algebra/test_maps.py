"""Operators over maps of several kinds: they meet on one axis, or not at all.

All axes here are as long as there are channels, so that a confused axis computes something.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import add, matmul

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.algebra.maps import ANYTHING, TOKENS, Axes, Maps, second
from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.errors import NotLinear
from tests.convolution_reference import CLEARLY_WRONG, assert_same, error, reference
from tests.norms import randomise_norms
from tests.operator_factories import ONE, conv, random_tensor

SIZE = 4
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "conv 1-d": lambda: nn.Conv1d(SIZE, SIZE, 3, padding=1),
    "point 1-d": lambda: nn.Conv1d(SIZE, SIZE, 1, bias=False),
    "conv 2-d": lambda: nn.Conv2d(SIZE, SIZE, 3, padding=1, groups=2),
    "point 2-d": lambda: nn.Conv2d(SIZE, SIZE, 1),
    "conv 3-d": lambda: nn.Conv3d(SIZE, SIZE, (3, 1, 3), padding=(1, 0, 1)),
    "point 3-d": lambda: nn.Conv3d(SIZE, SIZE, 1, bias=False),
    "norm 1-d": lambda: nn.BatchNorm1d(SIZE),
    "norm 2-d": lambda: nn.BatchNorm2d(SIZE),
    "norm 3-d": lambda: nn.BatchNorm3d(SIZE),
    "norm": lambda: nn.SyncBatchNorm(SIZE),
    "identity": nn.Identity,
    "pool 1-d": lambda: nn.AvgPool1d(3, 1, 1),
    "pool 2-d": lambda: nn.AvgPool2d(3, 1, 1),
}
PAIRS = [(left, right) for left in LAYERS for right in LAYERS]


def made(name: str) -> nn.Module:
    torch.manual_seed(len(name))
    return randomise_norms(LAYERS[name]()).double().eval()


def runs(layer: nn.Module) -> dict[int, Callable[[Tensor], Tensor]]:
    """The numbers of axes of a map, a batch included, on which a layer runs."""

    def is_taken(count: int) -> bool:
        try:
            layer(torch.zeros((SIZE,) * count, dtype=torch.float64))
        except (RuntimeError, ValueError, IndexError):
            return False
        return True

    return {count: layer for count in range(2, 6) if is_taken(count)}


def common(left: nn.Module, right: nn.Module) -> list[int]:
    """The numbers of axes on which both run; where one is a norm there is a batch."""
    counts = runs(left).keys() & runs(right).keys()
    if any(isinstance(layer, NORMS) for layer in (left, right)):
        least = 2 + max(map(rank_of, (left, right)))
        counts = {count for count in counts if count >= least}
    return sorted(counts)


def rank_of(layer: nn.Module) -> int:
    """How many axes a conv or a pool has; 0 for what takes maps of several ranks."""
    name = type(layer).__name__
    return 0 if isinstance(layer, NORMS) or not name.endswith("d") else int(name[-2])


def channel_axis(layer: nn.Module, count: int) -> int | None:
    """The axis of a map with so many axes that a layer takes for its channels; None: any."""
    if isinstance(layer, nn.Linear):
        return count - 1
    if isinstance(layer, NORMS):
        return 1
    return None if isinstance(layer, nn.Identity) else count - 1 - rank_of(layer)


def acts_elsewhere(left: nn.Module, right: nn.Module, count: int) -> bool:
    axes = {channel_axis(layer, count) for layer in (left, right)} - {None}
    return len(axes) > 1


@pytest.mark.parametrize(("first", "second_one"), PAIRS)
@pytest.mark.parametrize("combine", [add, matmul])
def test_two_layers_meet_where_they_mean_one_axis(
    combine: Callable[[ConvOperator, ConvOperator], ConvOperator], first: str, second_one: str
) -> None:
    left, right = made(first), made(second_one)
    operators = [conv_operator(layer, SIZE) for layer in (left, right)]
    counts = common(left, right)
    both = attempt(combine, *operators)
    if isinstance(both, str):
        is_axes = not counts or any(acts_elsewhere(left, right, count) for count in counts)
        assert is_axes or both.startswith("border")
        return
    for count in counts:
        x = random_tensor(*(SIZE,) * count, seed=count)
        with torch.no_grad():
            expected = left(x) + right(x) if combine is add else left(right(x))
            assert_same(both(x), expected, count)


def attempt(
    combine: Callable[[ConvOperator, ConvOperator], ConvOperator],
    left: ConvOperator,
    right: ConvOperator,
) -> ConvOperator | str:
    """The two as one, or why they are not."""
    try:
        return combine(left, right)
    except NotLinear as refusal:
        return refusal.reason


def test_what_is_refused_would_be_wrong() -> None:
    """A linear layer beside a conv on (N, T, C) with T = C: no one conv is their sum."""
    linear, point = made("linear"), made("point 1-d")
    x = random_tensor(SIZE, SIZE, SIZE)
    weight = conv_operator(linear).weight + conv_operator(point).weight[..., 0]
    for axes in (TOKENS, second(1)):
        op = ConvOperator(weight, conv_operator(linear).bias, axes=Axes("second")).over(axes)
        assert error(op(x), linear(x) + point(x)) > CLEARLY_WRONG


ONE_AXIS = [
    (ANYTHING, second(2), second(2)),
    (second(), second(3), second(3)),
    (second(0, 1), second(1), second(1)),
    (second(0, 1), second(), second(0, 1)),
    (second(0), TOKENS, TOKENS),
    (ANYTHING, TOKENS, TOKENS),
]
NO_AXIS = [
    (second(1), second(2), "a layer for 1-d maps cannot meet one for 2-d maps"),
    (second(0, 1), second(2), "a layer for 0-d or 1-d maps cannot meet one for 2-d maps"),
    (second(0, 1), TOKENS, "a linear layer works on the last axis, a conv or a norm on the second"),
    (second(), TOKENS, "they may be joined only where maps are known to be (N, C)"),
]


@pytest.mark.parametrize(("left", "right", "both"), ONE_AXIS)
def test_the_axes_that_suit_both(left: Axes, right: Axes, both: Axes) -> None:
    assert left.meet(right) == right.meet(left) == both


@pytest.mark.parametrize(("left", "right", "reason"), NO_AXIS)
def test_axes_that_are_not_the_same(left: Axes, right: Axes, reason: str) -> None:
    with pytest.raises(NotLinear) as caught:
        left.meet(right)
    assert reason in caught.value.reason


def test_maps_of_another_width_are_others() -> None:
    assert Maps(4, second()).meet(Maps(4, second(2))) == Maps(4, second(2))
    with pytest.raises(NotLinear, match="maps of 4 channels are none of 6"):
        Maps(4, second(2)).meet(Maps(6, second(2)))


def test_an_operator_tells_what_it_reads_and_gives() -> None:
    op = conv(3, 3, channels=(4, 6))
    assert (op.reads, op.gives) == (Maps(4, second(2)), Maps(6, second(2)))
    assert conv(channels=(4, 6)).gives == Maps(6, TOKENS)
    assert conv_operator(nn.BatchNorm1d(4)).reads == Maps(4, second(0, 1))
    assert conv_operator(nn.SyncBatchNorm(4)).reads == Maps(4, second())
    assert conv_operator(nn.Identity(), 4).reads == Maps(4, ANYTHING)


@pytest.mark.parametrize("combine", [add, matmul])
def test_a_norm_of_any_rank_takes_that_of_a_conv(
    combine: Callable[[ConvOperator, ConvOperator], ConvOperator],
) -> None:
    norm, point = conv_operator(made("norm")), conv_operator(made("point 3-d"))
    assert (norm.rank, point.rank) == (0, 3)
    assert combine(norm, point).rank == combine(point, norm).rank == 3
    assert combine(norm, norm).gives.axes == second()
    assert type((norm @ point).to_module()) is nn.Conv3d


@pytest.mark.parametrize("rank", range(5))
def test_a_norm_of_any_rank_on_maps_of_each(rank: int) -> None:
    layer = made("norm")
    op, x = conv_operator(layer), random_tensor(*(SIZE,) * (rank + 2), seed=rank)
    with torch.no_grad():
        assert_same(op(x), layer(x))
        assert_same(reference(op, x), layer(x))
        assert_same(op.with_rank(rank)(x) if 0 < rank < 4 else op(x), layer(x))


def test_an_operator_for_maps_of_several_ranks_is_no_one_layer() -> None:
    with pytest.raises(NotLinear, match="no one conv and no linear layer reads maps of any rank"):
        conv_operator(nn.SyncBatchNorm(4)).to_module()
    with pytest.raises(NotLinear, match="no linear layer reads 0-d or 1-d maps"):
        conv_operator(nn.BatchNorm1d(4)).to_module()


def test_a_kernel_is_for_maps_of_its_own_rank() -> None:
    assert conv(1, 1).with_rank(2).rank == 2
    for op, rank in [(conv(3, 3), 1), (conv(1), 2), (conv(), 1), (conv(1), 0)]:
        with pytest.raises(NotLinear):
            op.with_rank(rank)
    with pytest.raises(AssertionError, match="a kernel with 1 axes is not for 2-d maps"):
        ConvOperator(random_tensor(4, 4, 3), axes=second(2))


def test_the_identity_of_any_maps_gives_its_input_back() -> None:
    one = identity(4, ANYTHING, like=ONE)
    for count in (2, 3, 5):
        x = random_tensor(*(SIZE,) * count)
        assert torch.equal(one(x), x)
