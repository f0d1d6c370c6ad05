"""Kernels of many blocks made together: each is what its block alone makes."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler import generation
from orepa_compiler.blocks import ReparamConv
from orepa_compiler.generation import together
from orepa_compiler.generation.filters import filters_of
from orepa_compiler.generation.together import generate_together
from tests.convolution_reference import assert_same
from tests.generation.test_squeeze import by_algebra, gradients, kept_for_backward, trained
from tests.operator_factories import random_tensor

# Forms of several blocks and of one, and a block that is made by itself.
NAMES = ("3x3", "1x1", "3x3", "depthwise", "groups 2", "3x3", "with a wide branch", "1x1", "stem")
NAMES_3D = ("1d", "3d", "3d groups", "1d", "separable alone", "one tap alone", "wide alone")


@pytest.fixture(autouse=True)
def in_few_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SMALL_TOGETHER", 2**30)
    monkeypatch.setattr(generation, "ALIKE", 1)


def several(names: tuple[str, ...], scaling: Any = "vector") -> list[ReparamConv]:
    blocks = [trained(name, scaling) for name in names]
    with torch.no_grad():
        for number, block in enumerate(blocks):
            for parameter in block.parameters():
                parameter.add_(random_tensor(*parameter.shape, seed=50 + number) * 0.1)
    return blocks


def assert_agree(blocks: list[ReparamConv]) -> None:
    operators = generate_together(blocks)
    seeds = [random_tensor(*made.weight.shape, seed=5) for made in operators]
    torch.autograd.backward([made.weight for made in operators], seeds)
    for block, made in zip(blocks, operators, strict=True):
        expected = by_algebra(block)
        assert_same(made.weight, expected.weight)
        assert made.stride == expected.stride
        assert made.padding == expected.padding
        for name, grad in gradients(block, expected).items():
            assert_same(block.get_parameter(name).grad, grad, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("scaling", ["vector", "scalar", "none"])
@pytest.mark.parametrize("names", [NAMES, NAMES_3D])
def test_together_is_each_alone(names: tuple[str, ...], scaling: str) -> None:
    assert_agree(several(names, scaling))


def test_the_same_in_channels_last_and_where_layouts_are_mixed() -> None:
    blocks = several(NAMES)
    for block in blocks[:5]:
        block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_agree(blocks)
    for block, made in zip(blocks, generate_together(blocks), strict=True):
        if "origin" in block.branches and "wide" not in block.branches:
            origin = block.branches["origin"].weight
            assert made.weight.stride() == origin.stride()  # type: ignore[operator]


def test_the_same_where_too_many_numbers_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "MOST_NUMBERS", 10**4)
    assert_agree(several(NAMES))


def backward(blocks: list[ReparamConv], *, skipped: int | None = None) -> None:
    made = [operator.weight for operator in generate_together(blocks)]
    used = [weight for number, weight in enumerate(made) if number != skipped]
    torch.autograd.backward(used, [random_tensor(*w.shape, seed=5) for w in used])


def test_gradients_are_views_that_do_not_overlap_with_the_strides_of_parameters() -> None:
    blocks = several(("3x3", "3x3", "1x1", "1x1"))
    for block in blocks:
        block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    backward(blocks)
    spans = []
    for block in blocks:
        for name, parameter in block.named_parameters():
            if name != "bias":
                grad = parameter.grad
                assert grad is not None
                assert grad.stride() == parameter.stride(), name
                spans.append((grad.data_ptr(), grad.data_ptr() + grad.nbytes))
    spans.sort()
    for (_, end), (start, _) in pairwise(spans):
        assert start >= end
    storages = {p.grad.untyped_storage().data_ptr() for b in blocks for p in b.parameters()
                if p.grad is not None}  # fmt: skip
    assert len(storages) < len(spans) / 2, "blocks of one form share their memory"


def test_a_block_that_no_gradient_reaches_gets_none() -> None:
    blocks = several(NAMES[:3])
    alone = copy.deepcopy(blocks)
    backward(blocks, skipped=0)
    assert all(parameter.grad is None for parameter in blocks[0].parameters())
    for block, other in zip(blocks[1:], alone[1:], strict=True):
        expected = gradients(other, by_algebra(other))
        for name, grad in expected.items():
            assert_same(block.get_parameter(name).grad, grad, name)  # type: ignore[arg-type]


def test_nothing_but_parameters_is_kept_for_backward() -> None:
    blocks = several(NAMES)
    places = {p.data_ptr() for block in blocks for p in block.parameters()}
    with kept_for_backward() as kept:
        made = generate_together(blocks)
    assert all(operator.weight.requires_grad for operator in made)
    assert sum(t.numel() for t in kept if t.data_ptr() not in places and t.is_floating_point()) == 0


class Together(nn.Module):
    def __init__(self, blocks: list[ReparamConv]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(operator.weight for operator in generate_together(list(self.blocks)))  # type: ignore[arg-type]


def test_first_and_second_derivatives_by_differences() -> None:
    net = Together(several(("3x3 narrow", "1x1 groups", "3x3 narrow")))
    names, values = zip(*net.named_parameters(), strict=True)

    def kernels(*parameters: Tensor) -> Any:
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), ())

    assert torch.autograd.gradcheck(kernels, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(kernels, values, fast_mode=True)


def test_a_parameter_edited_between_forward_and_backward_is_an_error() -> None:
    blocks = several(("1x1", "1x1"))
    made = generate_together(blocks)
    with torch.no_grad():
        blocks[1].branches["origin"].weight.mul_(2)  # type: ignore[operator,union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made[0].weight.sum().backward()


def test_transforms_see_plain_operations() -> None:
    blocks = several(("1x1", "1x1"))
    named = dict(Together(blocks).named_parameters())

    def norm(parameters: dict[str, Tensor]) -> Tensor:
        made = torch.func.functional_call(Together(blocks), parameters, ())
        return sum(weight.square().sum() for weight in made)  # type: ignore[no-any-return]

    found = torch.func.grad(norm)(named)
    norm(named).backward()
    for name, parameter in named.items():
        if parameter.grad is not None:
            assert_same(found[name], parameter.grad, name)


def test_on_a_cpu_blocks_alone_of_their_form_and_large_ones_are_made_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = several(("3x3", "1x1", "3x3", "depthwise"))
    monkeypatch.setattr(generation, "ALIKE", 2)
    assert set(together.made_together(blocks)) == {0, 2}
    monkeypatch.setattr(generation, "SMALL_TOGETHER", blocks[0].weight.numel() - 1)
    assert together.made_together(blocks) == {}
    elsewhere = [copy.deepcopy(block).to("meta") for block in blocks]
    assert set(together.made_together(elsewhere)) == {0, 1, 2, 3}


# Constants are made once


def test_filters_are_made_once_and_anew_where_they_changed() -> None:
    branches = [[trained("3x3").branches[name] for name in ("pointwise", "average", "frequency")]]
    first = filters_of(branches)
    assert filters_of(branches) is first
    with torch.no_grad():
        branches[0][2].prior.mul_(2)  # type: ignore[operator,union-attr]
    second = filters_of(branches)
    assert_same(second[..., 2], 2 * first[..., 2])
    branches[0][2].prior = branches[0][2].prior.flip(0)  # type: ignore[operator,assignment]
    assert_same(filters_of(branches)[..., 2], second[..., 2].flip(1))
    assert_same(
        filters_of([[branches[0][1]]])[..., 0], torch.full((1, 32, 9), 1 / 9, dtype=torch.float64)
    )
    for branch in branches[0]:
        branch.float()
    assert filters_of(branches).dtype == torch.float32
