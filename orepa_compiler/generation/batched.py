"""Makes the kernels of blocks of one form in few operations for all of them.

It computes what `rules` computes, over stacks of parameters and without parts: there memory is
saved, here launches. So it is the way of a GPU, and of small kernels on a CPU.

Letters: b counts blocks, o output channels, i input channels of a group, t the channels between
two layers, j those that a depthwise layer makes of one, k taps, m one-tap branches, g groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from orepa_compiler.branches import (
    DEPTHWISE_MULTIPLIER,
    AveragePool,
    DepthwisePointwise,
    FrequencyFilter,
    Kernel,
    Pointwise,
    PointwiseKernel,
    PointwisePointwise,
)
from orepa_compiler.generation.filters import filters_of
from orepa_compiler.generation.forms import BlockForm
from orepa_compiler.generation.stacking import Slot, handed_out

ONE_TAP = (Pointwise, AveragePool, FrequencyFilter)
# The two layers of each, inner and outer, in the order of their parameters.
CONTRACTIONS = (PointwiseKernel, PointwisePointwise)

Values = Sequence[Tensor]


@dataclass(frozen=True)
class Batch:
    """Blocks of one form. values: of each, its scaling parameter if there is one, and the others.

    branches: of each block, those of the form.
    """

    form: BlockForm
    branches: Sequence[Sequence[Any]]
    values: Sequence[Values]

    def slots(self) -> list[Slot]:
        """What is to be stacked, in the order in which Stacks reads it."""
        form, scaled_stack = self.form, self.form.scaling is not None
        columns = list(zip(*(own[scaled_stack:] for own in self.values), strict=True))
        one_tap = form.of_kind(*ONE_TAP)
        places = [form.first(branch) for branch in one_tap]
        slots: list[Slot] = [columns[n] for n in range(len(columns)) if n not in places]
        slots += [[weight for n in places for weight in columns[n]]] if places else []
        if scaled_stack:
            rows = list(zip(*(own[0].unbind() for own in self.values), strict=True))
            others = [row for n, row in enumerate(form.rows) if n not in one_tap]
            slots += [rows[row] for row in others]
            slots += [[v for n in one_tap for v in rows[form.rows[n]]]] if one_tap else []
        return slots


class Stacks:
    """The stacked parameters of a batch."""

    def __init__(
        self, form: BlockForm, branches: Sequence[Sequence[Any]], given: list[Tensor]
    ) -> None:
        self.form, self.count = form, len(branches)
        left = iter(given)
        one_tap = form.of_kind(*ONE_TAP)
        others = [n for n in range(len(form.kinds)) if n not in one_tap]
        self.layers = {n: [next(left) for _ in form.parameters[n]] for n in others}
        taps = (len(one_tap), self.count * form.rows_out)
        self.weights = next(left).view(*taps, form.width) if one_tap else None
        self.factors: dict[int, Tensor] = {}
        self.tap_factors: Tensor | None = None
        if form.scaling is not None:
            self.factors = {n: next(left)[:, :, None, None] for n in others}
            if one_tap:
                self.tap_factors = next(left).view(len(one_tap), self.count, -1)
        chosen = [[own[n] for n in one_tap] for own in branches]
        self.filters = filters_of(chosen) if one_tap else None

    def kernel(self, branch: int) -> Tensor:
        """The k x k parameter of a branch as (b, o, k, channels), a view."""
        layer, place = self.layers[branch][-1], self.form.parameters[branch][-1]
        out, width = place.shape[:2]
        if place.last:
            return layer.view(self.count, out, self.form.taps, width)
        return layer.view(self.count, out, width, self.form.taps).transpose(2, 3)

    def plain_filters(self) -> Tensor:
        """F_m, (b o, k, m)."""
        assert self.filters is not None
        return self.filters.flatten(0, 1)

    def scaled_filters(self) -> Tensor:
        """v_m F_m, (b o, k, m)."""
        assert self.filters is not None
        if self.tap_factors is None:
            return self.plain_filters()
        factors = self.tap_factors.permute(1, 2, 0).unsqueeze(2)
        return (self.filters * factors).flatten(0, 1)

    def depthwise(self, branch: int) -> tuple[Tensor, Tensor]:
        """depthwise (b g i, j, k) and pointwise (b, g, o, i, j) of such a branch."""
        depthwise, pointwise = self.layers[branch]
        form = self.form
        shape = (self.count, form.groups, -1, form.width, DEPTHWISE_MULTIPLIER)
        return depthwise.view(-1, DEPTHWISE_MULTIPLIER, form.taps), pointwise.view(shape)

    def inner(self, branch: int) -> Tensor:
        """The 1 x 1 of a contraction, (b g, t, i), without the identity."""
        return self.layers[branch][0].view(self.count * self.form.groups, -1, self.form.width)

    def grouped(self, kernel: Tensor) -> Tensor:
        """(b, o, k, channels) as (b g, o k, channels)."""
        return kernel.reshape(self.count * self.form.groups, -1, kernel.shape[-1])


def kernels(stacks: Stacks) -> list[Tensor]:
    """W_e of each block, (C_out, C_in / groups, *K), in the memory layout of the parameters."""
    form = stacks.form
    total: Tensor | None = None
    for branch in form.of_kind(*CONTRACTIONS):
        total = _beside(total, _contracted(stacks, branch), stacks.factors.get(branch))
    for branch in form.of_kind(Kernel):
        kernel = stacks.kernel(branch)
        total = _beside(total, kernel, stacks.factors.get(branch))
    if stacks.weights is not None:
        total = _with_taps(total, stacks)
    for branch in form.of_kind(DepthwisePointwise):
        made = _separable(stacks, branch)
        total = copied(made) if total is None else total.add_(made)
    assert total is not None
    stack = total if form.last else total.transpose(2, 3)
    return handed_out(stack.contiguous(), form.kernel)


def _beside(total: Tensor | None, kernel: Tensor, factor: Tensor | None) -> Tensor:
    """total + v W, in place where there is a total."""
    if total is None:
        return copied(kernel) if factor is None else scaled_stack(kernel, factor)
    return total.add_(kernel) if factor is None else total.addcmul_(kernel, factor)


def _contracted(stacks: Stacks, branch: int) -> Tensor:
    """R[o, i, k] = sum_t K[o, t, k] D[t, i]."""
    form = stacks.form
    kernel = stacks.kernel(branch)
    inner = stacks.inner(branch)
    if has_identity(form, branch):
        made = times_difference(stacks.grouped(kernel), inner)
    else:
        made = torch.bmm(stacks.grouped(kernel), inner)
    return made.view(stacks.count, form.rows_out, form.taps, form.width)


def times_difference(left: Tensor, right: Tensor) -> Tensor:
    """left (identity + right): right is stored as its difference from it."""
    if right.shape[1] == right.shape[2]:
        return torch.baddbmm(left, left, right)  # the identity takes no product
    return torch.bmm(left, right + _identity(right))


def _identity(like: Tensor) -> Tensor:
    return _repeated_identity(like.shape[1], like.shape[2], like.dtype, like.device)


@lru_cache(maxsize=64)
def _repeated_identity(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns): ones where a row's number is a column's, modulo the shorter side."""
    short = min(rows, columns)
    with torch.inference_mode(False):
        eye = torch.eye(short, dtype=dtype, device=device)
        return eye.repeat(rows // short, columns // short)


def _with_taps(total: Tensor | None, stacks: Stacks) -> Tensor:
    """total + sum_m v_m w_m[o, i] F_m[o, k]."""
    assert stacks.weights is not None
    filters, weights = stacks.scaled_filters(), stacks.weights.transpose(0, 1)
    if total is not None:
        total.flatten(0, 1).baddbmm_(filters, weights)
        return total
    return torch.bmm(filters, weights).unflatten(0, (stacks.count, -1))


def _separable(stacks: Stacks, branch: int) -> Tensor:
    """v_o sum_j p[o, i, j] d[i, j, k], (b, o, k, i), a view."""
    form = stacks.form
    depthwise, _ = stacks.depthwise(branch)
    made = torch.bmm(depthwise.transpose(1, 2), columns(stacks, branch))
    made = made.view(stacks.count, form.groups, form.width, form.taps, -1)
    return made.permute(0, 1, 4, 3, 2).flatten(1, 2)


def columns(stacks: Stacks, branch: int) -> Tensor:
    """v_o p[o, i, j] with the output channels as columns, (b g i, j, o)."""
    pointwise = stacks.depthwise(branch)[1].permute(0, 1, 3, 4, 2)
    factor = stacks.factors.get(branch)
    if factor is None:
        return pointwise.flatten(0, 2)
    own = by_group(factor, stacks.form.groups).permute(0, 1, 3, 4, 2)
    return scaled_stack(pointwise, own).flatten(0, 2)


def by_group(factor: Tensor, groups: int) -> Tensor:
    """(b, o, 1, 1) as (b, g, o, 1, 1); one factor for all is for all groups."""
    return factor.unsqueeze(1) if factor.shape[1] == 1 else factor.unflatten(1, (groups, -1))


def scaled_stack(kernel: Tensor, factor: Tensor) -> Tensor:
    """v W as new memory, contiguous in the order of its axes."""
    return torch.mul(kernel, factor, out=kernel.new_empty(kernel.shape))


def copied(kernel: Tensor) -> Tensor:
    """A copy, contiguous in the order of its axes."""
    return kernel.clone(memory_format=torch.contiguous_format)


def has_identity(form: BlockForm, branch: int) -> bool:
    return form.kinds[branch] is PointwiseKernel
