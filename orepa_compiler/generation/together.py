"""The kernels of many blocks in one autograd Function: those of one form in the same operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orepa_compiler import generation
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.generation import (
    Recipe,
    SqueezableBlock,
    generate,
    is_watched,
    recipe_of,
    recomputed,
    through_algebra,
)
from orepa_compiler.generation.algebra import full_precision
from orepa_compiler.generation.batched import Batch, Stacks, kernels
from orepa_compiler.generation.batched_gradients import grad_slot, gradients
from orepa_compiler.generation.forms import Form
from orepa_compiler.generation.stacking import stacked

# So many numbers of stacked kernels at most: what is made on the way stays small beside features.
MOST_NUMBERS = 2**24


def generate_together(blocks: Sequence[SqueezableBlock]) -> list[ConvOperator]:
    """The operators of the blocks, as `generate` gives them, in few operations.

    Blocks of one form, whatever their stride and padding, are made in the same operations. What is
    recorded for backward is the parameters. A block that is cut into parts on a CPU, or that has no
    branch with a rule, is made by itself.
    """
    if is_watched():
        return [generate(block) for block in blocks]
    made = made_together(blocks)
    return [made.get(number) or generate(block) for number, block in enumerate(blocks)]


def made_together(blocks: Sequence[SqueezableBlock]) -> dict[int, ConvOperator]:
    """The operators of those blocks alone that are made with others, by their numbers."""
    recipes = [recipe_of(block) for block in blocks]
    forms = [recipe.form(generation.SMALL_TOGETHER) for recipe in recipes]
    made: dict[int, ConvOperator] = {}
    for group in _by_device(forms):
        members = _Members(tuple(recipes[n] for n in group), tuple(forms[n] for n in group))  # type: ignore[misc]
        values = [value for recipe in members.recipes for value in recipe.values()]
        for number, weight in zip(group, _SqueezeTogether.apply(members, *values), strict=True):
            made[number] = _operator(blocks[number], recipes[number], weight)
    return made


def _operator(block: SqueezableBlock, recipe: Recipe, weight: Tensor) -> ConvOperator:
    whole = block.spatial(weight, block.groups)
    rows = [row for row in range(len(block.branches)) if row not in recipe.rows]
    return whole.beside(recomputed(block, rows)) if rows else whole


def _by_device(forms: Sequence[Form | None]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for number, form in enumerate(forms):
        if form is not None:
            groups.setdefault((form.device, form.dtype), []).append(number)
    return list(groups.values())


@dataclass(frozen=True)
class _Members:
    """The blocks that are made by one Function, all of one dtype on one device."""

    recipes: tuple[Recipe, ...]
    forms: tuple[Form, ...]

    def values(self, flat: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The scaling parameter, if there is one, and the others, of each block."""
        left = iter(flat)
        return [[next(left) for _ in recipe.values()] for recipe in self.recipes]

    def batches(self, wanted: Sequence[int]) -> Iterator[list[int]]:
        """The wanted blocks, those of one form together."""
        alike: dict[Form, list[int]] = {}
        for number in wanted:
            alike.setdefault(self.forms[number], []).append(number)
        for form, numbers in alike.items():
            most = max(MOST_NUMBERS // form.kernel.shape.numel(), 1)
            for start in range(0, len(numbers), most):
                yield numbers[start : start + most]

    def batch(self, numbers: Sequence[int], values: Sequence[Sequence[Tensor]]) -> Batch:
        branches = [self.recipes[number].branches for number in numbers]
        return Batch(self.forms[numbers[0]], branches, [values[number] for number in numbers])

    def kernels(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """W_e of each block."""
        values, made = self.values(flat), {}
        wholes = list(self.batches(range(len(self.recipes))))
        batches = [self.batch(numbers, values) for numbers in wholes]
        stacks = iter(stacked([slot for batch in batches for slot in batch.slots()]))
        for numbers, batch in zip(wholes, batches, strict=True):
            given = [next(stacks) for _ in batch.slots()]
            own = kernels(Stacks(batch.form, batch.branches, given))
            made.update(zip(numbers, own, strict=True))
        return [made[number] for number in range(len(self.recipes))]

    def gradients(
        self, flat: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[list[Tensor] | None]:
        """Of each block whose kernel was reached, the gradients of its values."""
        reached = {number: grad for number, grad in enumerate(grads) if grad is not None}
        values, found = self.values(flat), {}
        wholes = list(self.batches(list(reached)))
        batches = [self.batch(numbers, values) for numbers in wholes]
        slots = [slot for batch in batches for slot in batch.slots()]
        slots += [
            grad_slot(batch.form, [reached[number] for number in numbers])
            for numbers, batch in zip(wholes, batches, strict=True)
        ]
        stacks = stacked(slots)
        of_kernels = iter(stacks[len(slots) - len(batches) :])
        left = iter(stacks)
        for numbers, batch in zip(wholes, batches, strict=True):
            given = Stacks(batch.form, batch.branches, [next(left) for _ in batch.slots()])
            found.update(zip(numbers, gradients(given, next(of_kernels)), strict=True))
        return [found.get(number) for number in range(len(self.recipes))]


class _SqueezeTogether(torch.autograd.Function):
    """The kernels of several recipes."""

    @staticmethod
    def forward(ctx: Any, members: _Members, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.members = members
        ctx.save_for_backward(*values)
        ctx.set_materialize_grads(False)
        with full_precision():
            return tuple(members.kernels(values))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        members, values = ctx.members, ctx.saved_tensors
        with full_precision():
            if torch.is_grad_enabled():  # a second derivative will be asked for
                found = [
                    None if grad is None else through_algebra(recipe, grad, *recipe.split(own))
                    for recipe, own, grad in zip(
                        members.recipes, members.values(values), grads, strict=True
                    )
                ]
            else:
                found = members.gradients(values, grads)
        pairs = zip(found, members.values(values), strict=True)
        return None, *(g for own, like in pairs for g in own or [None] * len(like))
