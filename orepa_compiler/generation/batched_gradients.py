"""Computes the gradients of blocks of one form in few operations: see `batched`.

Everything is linear in G = dL/dW_e, so nothing but the parameters is needed. The products whose
sums are the scaling layers' gradients, dv = <W_m, G>, stand side by side in one table, and one
product with ones and zeros adds them all up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from orepa_compiler.branches import DepthwisePointwise, Kernel
from orepa_compiler.generation.batched import (
    CONTRACTIONS,
    ONE_TAP,
    Stacks,
    by_group,
    columns,
    copied,
    has_identity,
    scaled_stack,
    times_difference,
)
from orepa_compiler.generation.forms import BlockForm
from orepa_compiler.generation.stacking import Slot, handed_out


def grad_slot(form: BlockForm, grads: Sequence[Tensor]) -> Slot:
    """The gradients of the blocks' kernels, in one order in memory, whatever came."""
    if not form.last:
        return [grad.contiguous() for grad in grads]
    return [grad.movedim(1, -1).contiguous() for grad in grads]


def gradients(stacks: Stacks, given: Tensor) -> list[list[Tensor]]:
    """Of each block, the gradients of its scaling parameter, if it has one, and of the others.

    given: the stacked `grad_slot`. All are views of stacks, with the strides of the parameters.
    """
    form = stacks.form
    grad = _kernels_of(form, given)
    table = _Table(form, stacks.count, given)
    found: dict[int, list[Tensor]] = {}
    for branch in form.of_kind(*CONTRACTIONS):
        found[branch] = _contraction(stacks, branch, grad, table)
    for branch in form.of_kind(Kernel):
        table.note(branch, stacks.kernel(branch), grad)
        found[branch] = [_times(stacks, branch, grad)]
    if stacks.weights is not None:
        found |= _one_tap(stacks, grad, table)
    for branch in form.of_kind(DepthwisePointwise):
        found[branch] = _separable(stacks, branch, grad, table)
    return _by_block(form, found, table.sums())


def _by_block(
    form: BlockForm, found: dict[int, list[Tensor]], of_scaling: Tensor | None
) -> list[list[Tensor]]:
    columns = []
    if of_scaling is not None:
        assert form.scaling is not None
        columns.append(handed_out(of_scaling, form.scaling))
    for branch, places in enumerate(form.parameters):
        pairs = zip(found[branch], places, strict=True)
        columns += [handed_out(stack, place) for stack, place in pairs]
    return [list(own) for own in zip(*columns, strict=True)]


def _kernels_of(form: BlockForm, given: Tensor) -> Tensor:
    """G, (b, o, k, i)."""
    if form.last:
        return given.view(-1, form.rows_out, form.taps, form.width)
    split = given.view(-1, form.rows_out, form.width, form.taps)
    return split.transpose(2, 3).contiguous()


class _Table:
    """The products that make dv: (b, o, columns), so many columns for each row of the scaling."""

    def __init__(self, form: BlockForm, count: int, like: Tensor) -> None:
        self.form = form
        self.segments = _segments(form)
        width = sum(size for _, size in self.segments)
        self.table = None if form.scaling is None else like.new_empty(count, form.rows_out, width)

    def note(self, branch: int, left: Tensor, right: Tensor) -> None:
        """<left, right> for each output channel: their axes are (b, o, ., .) or (b, g, o, ., .)."""
        if self.table is None:
            return
        start = 0
        for own, size in self.segments:
            if own == self.form.rows[branch]:
                break
            start += size
        place = self.table[:, :, start : start + left.shape[-2:].numel()]
        place = place.unflatten(2, left.shape[-2:])
        torch.mul(left, right, out=place.unflatten(1, left.shape[1:-2]))

    def sums(self) -> Tensor | None:
        """dv, (b, M, C_out) or (b, M, 1)."""
        if self.table is None:
            return None
        assert self.form.scaling is not None
        ones = _ones(self.segments, self.form.scaling.shape[0], self.table.dtype, self.table.device)
        made = torch.bmm(ones.expand(len(self.table), -1, -1), self.table.transpose(1, 2))
        return made.sum(2, keepdim=True) if self.form.scaling.shape[1] < made.shape[2] else made


def _segments(form: BlockForm) -> tuple[tuple[int, int], ...]:
    """Rows of the scaling parameter, and how many products each adds up; one-tap ones first."""
    one_tap = form.of_kind(*ONE_TAP)
    sizes = dict.fromkeys(one_tap, form.width)
    for n in form.of_kind(Kernel):
        sizes[n] = form.width * form.taps
    for n in (*form.of_kind(*CONTRACTIONS), *form.of_kind(DepthwisePointwise)):
        sizes[n] = form.parameters[n][-1].shape[1:].numel()
    return tuple((form.rows[n], size) for n, size in sizes.items())


@lru_cache(maxsize=64)
def _ones(
    segments: tuple[tuple[int, int], ...], rows: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(rows, columns of the table): ones where a column belongs to a row."""
    with torch.inference_mode(False):
        table = torch.zeros(rows, sum(size for _, size in segments), dtype=dtype)
        start = 0
        for row, size in segments:
            table[row, start : start + size] = 1
            start += size
        return table.to(device)


def _times(stacks: Stacks, branch: int, kernel: Tensor) -> Tensor:
    """v W, (b, o, k, c), in the memory order of the branch's k x k parameter."""
    factor = stacks.factors.get(branch)
    own = kernel if stacks.form.parameters[branch][-1].last else kernel.transpose(2, 3)
    return copied(own) if factor is None else scaled_stack(own, factor)


def _contraction(stacks: Stacks, branch: int, grad: Tensor, table: _Table) -> list[Tensor]:
    """H = G D^T:  dK = v H,  dv = <K, H>,  dD = (v K)^T G."""
    kernel = stacks.kernel(branch)
    inner, factor = stacks.inner(branch), stacks.factors.get(branch)
    grouped = stacks.grouped(grad)
    turned = inner.transpose(1, 2)
    is_difference = has_identity(stacks.form, branch)
    back = times_difference(grouped, turned) if is_difference else torch.bmm(grouped, turned)
    back = back.view(kernel.shape)
    table.note(branch, kernel, back)
    outer = kernel if factor is None else scaled_stack(kernel, factor)
    of_inner = torch.bmm(stacks.grouped(outer).transpose(1, 2), grouped)
    return [of_inner.view(stacks.count, -1), _times(stacks, branch, back)]


def _one_tap(stacks: Stacks, grad: Tensor, table: _Table) -> dict[int, list[Tensor]]:
    """g[o, i] = sum_k F G:  dw = v g,  dv = <w, g>."""
    form = stacks.form
    assert stacks.weights is not None
    branches = form.of_kind(*ONE_TAP)
    filters = stacks.plain_filters()
    gathered = torch.bmm(filters.transpose(1, 2), grad.flatten(0, 1))
    weights = stacks.weights.transpose(0, 1)
    split = (stacks.count, form.rows_out)
    table.note(branches[0], weights.unflatten(0, split), gathered.unflatten(0, split))
    by_branch = gathered.unflatten(0, split).permute(2, 0, 1, 3)
    if stacks.tap_factors is None:
        made = by_branch.contiguous()
    else:
        made = scaled_stack(by_branch, stacks.tap_factors.unsqueeze(3))
    return {branch: [own] for branch, own in zip(branches, made.unbind(), strict=True)}


def _separable(stacks: Stacks, branch: int, grad: Tensor, table: _Table) -> list[Tensor]:
    """q = sum_k G d:  dp = v q,  dv = <p, q>,  dd = sum_o v p G."""
    form = stacks.form
    depthwise, pointwise = stacks.depthwise(branch)
    by_channel = grad.unflatten(1, (form.groups, -1)).permute(0, 1, 4, 3, 2)
    by_channel = by_channel.reshape(-1, form.taps, pointwise.shape[2])
    gathered = torch.bmm(depthwise, by_channel)
    shape = (stacks.count, form.groups, form.width, *gathered.shape[1:])
    gathered = gathered.view(shape).permute(0, 1, 4, 2, 3)
    table.note(branch, pointwise, gathered)
    factor = stacks.factors.get(branch)
    own = None if factor is None else by_group(factor, form.groups)
    of_pointwise = gathered.contiguous() if own is None else scaled_stack(gathered, own)
    of_depthwise = torch.bmm(columns(stacks, branch), by_channel.transpose(1, 2))
    return [of_depthwise.view(stacks.count, -1), of_pointwise]
