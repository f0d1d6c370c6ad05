"""Makes the kernels of many blocks in one autograd Function, those of one form together."""

from __future__ import annotations

from collections import Counter
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
from orepa_compiler.generation.batched import Batch, Stacks, kernels
from orepa_compiler.generation.batched_gradients import grad_slot, gradients
from orepa_compiler.generation.forms import BlockForm
from orepa_compiler.generation.squeezing import full_precision
from orepa_compiler.generation.stacking import stacked

# So many numbers of stacked kernels at most: what is made on the way stays small beside features.
MOST_NUMBERS = 2**24


def generate_together(blocks: Sequence[SqueezableBlock]) -> list[ConvOperator]:
    """The operators of the blocks, as `generate` gives them, in few operations.

    Blocks of one form, whatever their stride and padding, are made in the same operations. What is
    recorded for backward is the parameters. A block that has no branch with a rule is made by
    itself; on a CPU also one that is alone of its form, or large.
    """
    if is_watched():
        return [generate(block) for block in blocks]
    made = made_together(blocks)
    return [made.get(number) or generate(block) for number, block in enumerate(blocks)]


def made_together(blocks: Sequence[SqueezableBlock]) -> dict[int, ConvOperator]:
    """The operators of those blocks alone that are made with others, by their numbers."""
    made: dict[int, ConvOperator] = {}
    for members, group in groups_of(blocks).values():
        values = [value for recipe in members.recipes for value in recipe.values()]
        weights = _SqueezeTogether.apply(members, *values)
        for number, recipe, weight in zip(group, members.recipes, weights, strict=True):
            made[number] = operator_of(blocks[number], recipe, weight)
    return made


def groups_of(blocks: Sequence[SqueezableBlock]) -> dict[Any, tuple[Members, list[int]]]:
    """The blocks that are made with others, by device and dtype, and their numbers."""
    recipes = [recipe_of(block) for block in blocks]
    forms = [recipe.form(generation.SMALL_TOGETHER) for recipe in recipes]
    counts = Counter(forms)
    numbers: dict[Any, list[int]] = {}
    for number, form in enumerate(forms):
        if form is None:
            continue
        if form.device.type != "cpu" or counts[form] >= generation.ALIKE:
            numbers.setdefault((form.device, form.dtype), []).append(number)
    return {
        key: (Members(tuple(recipes[n] for n in own), tuple(forms[n] for n in own)), own)  # type: ignore[misc]
        for key, own in numbers.items()
    }


def operator_of(block: SqueezableBlock, recipe: Recipe, weight: Tensor) -> ConvOperator:
    """The block's operator with this kernel, and beside it the branches without a rule."""
    whole = block.spatial(weight, block.groups)
    rows = [row for row in range(len(block.branches)) if row not in recipe.rows]
    return whole.beside(recomputed(block, rows)) if rows else whole


@dataclass(frozen=True)
class Members:
    """The blocks that are made by one Function, all of one dtype on one device."""

    recipes: tuple[Recipe, ...]
    forms: tuple[BlockForm, ...]

    def values(self, flat: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The scaling parameter, if there is one, and the others, of each block."""
        left = iter(flat)
        return [[next(left) for _ in recipe.values()] for recipe in self.recipes]

    def batches(self, wanted: Sequence[int]) -> Iterator[list[int]]:
        """The wanted blocks, those of one form together."""
        alike: dict[BlockForm, list[int]] = {}
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
        values = self.values(flat)
        made: dict[int, Tensor] = {}
        wholes = list(self.batches(range(len(self.recipes))))
        batches = [self.batch(numbers, values) for numbers in wholes]
        slots = [batch.slots() for batch in batches]
        stacks = iter(stacked([slot for own in slots for slot in own]))
        for numbers, batch, own in zip(wholes, batches, slots, strict=True):
            given = Stacks(batch.form, batch.branches, [next(stacks) for _ in own])
            made.update(zip(numbers, kernels(given), strict=True))
        return [made[number] for number in range(len(self.recipes))]

    def gradients(
        self, flat: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[list[Tensor] | None]:
        """Of each block whose kernel was reached, the gradients of its values."""
        reached = {number: grad for number, grad in enumerate(grads) if grad is not None}
        values = self.values(flat)
        found: dict[int, list[Tensor]] = {}
        wholes = list(self.batches(list(reached)))
        batches = [self.batch(numbers, values) for numbers in wholes]
        slots = [
            [*batch.slots(), grad_slot(batch.form, [reached[number] for number in numbers])]
            for numbers, batch in zip(wholes, batches, strict=True)
        ]
        stacks = iter(stacked([slot for own in slots for slot in own]))
        for numbers, batch, own in zip(wholes, batches, slots, strict=True):
            *given, of_kernels = [next(stacks) for _ in own]
            blocks = Stacks(batch.form, batch.branches, given)
            found.update(zip(numbers, gradients(blocks, of_kernels), strict=True))
        return [found.get(number) for number in range(len(self.recipes))]


class _SqueezeTogether(torch.autograd.Function):
    """The kernels of several recipes."""

    @staticmethod
    def forward(ctx: Any, members: Members, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.members = members
        ctx.save_for_backward(*values)
        ctx.set_materialize_grads(False)
        with full_precision():
            return tuple(members.kernels(values))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *eager_backward(ctx.members, ctx.saved_tensors, grads)


def eager_backward(
    members: Members, flat: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of all values; None for those of a block whose kernel was not reached."""
    values = members.values(flat)
    with full_precision():
        found: Sequence[Sequence[Tensor | None] | None]
        if torch.is_grad_enabled():  # a second derivative will be asked for
            triples = zip(members.recipes, values, grads, strict=True)
            found = [
                None if grad is None else _derived(recipe, own, grad)
                for recipe, own, grad in triples
            ]
        else:
            found = members.gradients(flat, grads)
    pairs = zip(found, values, strict=True)
    return [grad for own, like in pairs for grad in own or [None] * len(like)]


def _derived(recipe: Recipe, values: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """The gradients of a block's values, themselves differentiable."""
    made = through_algebra(recipe, grad, *recipe.split(values))
    return made if len(made) == len(values) else made[1:]
