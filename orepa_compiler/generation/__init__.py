"""Kernel generation at each step: W_e with a backward that keeps nothing but the parameters.

Autograd through `algebra.squeeze` holds every kernel on the way to W_e until backward. Here
the paper's branches go through one autograd Function, with gradients derived by hand
(`rules`); any other branch goes through the algebra, which runs once more in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.generation.batched import Batch, Stacks, kernels
from orepa_compiler.generation.batched_gradients import grad_slot, gradients
from orepa_compiler.generation.forms import BlockForm, block_form
from orepa_compiler.generation.rules import RULES, KernelRule, Term, TermGradient
from orepa_compiler.generation.squeezing import full_precision, squeeze
from orepa_compiler.generation.stacking import stacked

# What a branch must have in common with its block for its kernel to need no placing.
GEOMETRY = ("kernel_size", "stride", "pads", "dilation", "groups", "padding_mode")

# On a CPU, kernels of so many numbers at most are made in few operations: one alone, and several
# together. Beyond, memory that is passed over in parts costs less than operations do.
SMALL_ALONE, SMALL_TOGETHER = 0, 2**16
# And so many blocks of one form at least.
ALIKE = 2


class SqueezableBlock(Protocol):
    """What kernel generation reads of a block: its branches, its scaling layers, its geometry."""

    branches: Any
    scaling: nn.Parameter | None
    groups: int

    def spatial(self, weight: Tensor, groups: int) -> ConvOperator: ...


def generate(block: SqueezableBlock) -> ConvOperator:
    """The block's branches squeezed into one operator, differentiable in their parameters.

    W_e = sum_m diag(v_m) W_m                             (Hu et al. 2022, Eq. 4 and Sec. 3.2)

    What is recorded for backward is the parameters. They must be the same then: an edit in between
    raises. While torch.compile, torch.export, torch.func or forward-mode differentiation look on,
    it is plain operations, those of `squeeze`.
    """
    branches = list(block.branches.values())
    if is_watched():
        return squeeze(branches, block.scaling)
    recipe = recipe_of(block)
    rows = [row for row in range(len(branches)) if row not in recipe.rows]
    others = recomputed(block, rows) if rows else None
    if not recipe.rows:
        assert others is not None
        return others
    weight = _Squeeze.apply(recipe, recipe.form(SMALL_ALONE), block.scaling, *recipe.parameters())
    whole = block.spatial(weight, block.groups)
    return whole if others is None else whole.beside(others)


def is_watched() -> bool:
    """Whether operations are being recorded or transformed."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


@dataclass(frozen=True)
class Recipe:
    """The branches of a block that have a rule, and their rows in its scaling parameter."""

    block: SqueezableBlock
    rows: tuple[int, ...]
    branches: tuple[Any, ...]
    rules: tuple[KernelRule, ...]

    def parameters(self) -> list[Tensor]:
        """Branch by branch, as the rules name them."""
        return [parameter for own in self.layers() for parameter in own]

    def layers(self) -> list[list[Tensor]]:
        """The parameters of each branch."""
        pairs = zip(self.branches, self.rules, strict=True)
        return [[getattr(branch, name) for name in rule.names] for branch, rule in pairs]

    def values(self) -> list[Tensor]:
        """The scaling parameter, if there is one, and the others."""
        scaling = self.block.scaling
        return [*([] if scaling is None else [scaling]), *self.parameters()]

    def split(self, values: Sequence[Tensor]) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The scaling parameter, or None, and the others, of such values."""
        return (None, values) if self.block.scaling is None else (values[0], values[1:])

    def form(self, most: int) -> BlockForm | None:
        """What it shares with others that are made in the same few operations.

        None where the rules do better: on a CPU, for a kernel of more numbers than most.
        """
        if not self.rows:
            return None
        if self.parameters()[0].device.type == "cpu" and most == 0:
            return None
        form = block_form(self.branches, self.rows, self.block.scaling, self.layers())
        is_large = form is not None and form.kernel.shape.numel() > most
        return None if form is None or (is_large and form.device.type == "cpu") else form

    def names(self) -> list[str]:
        """The scaling parameter and these parameters, as `_Reference` names them."""
        keys = {id(branch): key for key, branch in self.block.branches.items()}
        paths = [f"block.branches.{keys[id(branch)]}." for branch in self.branches]
        pairs = zip(paths, self.rules, strict=True)
        return ["block.scaling", *(path + name for path, rule in pairs for name in rule.names)]

    def kernel(self, scaling: Tensor | None, parameters: Sequence[Tensor]) -> Tensor:
        """W_e, (C_out, C_in / groups, *K), in the memory layout of the parameters."""
        total: Tensor | None = None
        for rule, terms in self._by_rule(scaling, parameters):
            total = rule.add(total, [term for _, term in terms])
        assert total is not None
        weight = total.unflatten(2, self.branches[0].kernel_size)
        return _laid_out_like(parameters, weight)

    def gradients(
        self, grad: Tensor, scaling: Tensor | None, parameters: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of the scaling parameter and of the others, from that of W_e."""
        found: dict[int, TermGradient] = {}
        taps = grad.flatten(2)
        for rule, terms in self._by_rule(scaling, parameters):
            gradients = rule.gradients(taps, [term for _, term in terms])
            found.update(zip([number for number, _ in terms], gradients, strict=True))
        ordered = [found[number] for number in range(len(self.rows))]
        flat = [g for gradient in ordered for g in gradient.parameters]
        others = [g.reshape(p.shape) for g, p in zip(flat, parameters, strict=True)]
        return self._scaling_gradient(scaling, [gradient.factor for gradient in ordered]), others

    def _scaling_gradient(
        self, scaling: Tensor | None, factors: Sequence[Tensor | None]
    ) -> Tensor | None:
        if scaling is None:
            return None
        own = torch.stack([factor for factor in factors if factor is not None])
        own = own.sum_to_size(len(factors), scaling.shape[1])
        if len(self.rows) == len(scaling):
            return own
        rows = torch.tensor(self.rows, device=scaling.device)
        return torch.zeros_like(scaling).index_copy_(0, rows, own)

    def _by_rule(
        self, scaling: Tensor | None, parameters: Sequence[Tensor]
    ) -> Iterator[tuple[KernelRule, list[tuple[int, Term]]]]:
        """The terms of each rule, in the order of RULES, with their numbers in the recipe."""
        left = iter(parameters)
        factors = [None] * (max(self.rows) + 1) if scaling is None else scaling.unbind()
        terms = [
            Term(branch, factors[row], tuple(next(left) for _ in rule.names))
            for row, branch, rule in zip(self.rows, self.branches, self.rules, strict=True)
        ]
        for rule in dict.fromkeys(RULES.values()):
            own = [(n, term) for n, term in enumerate(terms) if self.rules[n] is rule]
            if own:
                yield rule, own


class _Squeeze(torch.autograd.Function):
    """The kernel of a recipe."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe,
        form: BlockForm | None,
        scaling: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.recipe, ctx.form = recipe, form
        ctx.save_for_backward(scaling, *parameters)
        with full_precision():
            if form is None:
                return recipe.kernel(scaling, parameters)
            return kernels(_stacks(recipe, form, scaling, parameters))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaling, *parameters = ctx.saved_tensors
        recipe, form = ctx.recipe, ctx.form
        with full_precision():
            if torch.is_grad_enabled():  # a second derivative will be asked for
                return None, None, *through_algebra(recipe, grad, scaling, parameters)
            if form is None:
                of_scaling, others = recipe.gradients(grad, scaling, parameters)
                return None, None, of_scaling, *others
            stacks = _stacks(recipe, form, scaling, parameters)
            (own,) = gradients(stacks, *stacked([grad_slot(form, [grad])]))
        return None, None, *([] if scaling is not None else [None]), *own


def _stacks(
    recipe: Recipe, form: BlockForm, scaling: Tensor | None, parameters: Sequence[Tensor]
) -> Stacks:
    values = [*([] if scaling is None else [scaling]), *parameters]
    batch = Batch(form, [recipe.branches], [values])
    return Stacks(form, batch.branches, stacked(batch.slots()))


class _Reference(nn.Module):
    """A recipe's kernel by the algebra, as a module, so that its parameters can be exchanged."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.block, self.recipe = recipe.block, recipe

    def forward(self) -> Tensor:
        scaling = self.block.scaling
        rows = None if scaling is None else scaling[list(self.recipe.rows)]
        return squeeze(self.recipe.branches, rows).weight


def through_algebra(
    recipe: Recipe, grad: Tensor, scaling: Tensor | None, parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """The same gradients, themselves differentiable."""
    given = [scaling, *parameters]
    # New tensors on the way to the parameters, so that hooks on these run once and not twice.
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in given]
    named = {n: t for n, t in zip(recipe.names(), inputs, strict=True) if t is not None}
    weight = torch.func.functional_call(_Reference(recipe), named, ())
    wanted = [tensor for tensor in named.values() if tensor.requires_grad]
    found = iter(torch.autograd.grad(weight, wanted, grad, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def recipe_of(block: SqueezableBlock) -> Recipe:
    """The branches whose kernels have the block's own shape and place, and a rule."""
    rows = [row for row, branch in enumerate(block.branches.values()) if _is_ruled(block, branch)]
    branches = tuple(list(block.branches.values())[row] for row in rows)
    recipe = Recipe(block, tuple(rows), branches, tuple(RULES[type(b)] for b in branches))
    tensors = [*recipe.parameters(), *([] if block.scaling is None else [block.scaling])]
    alike = len({(t.dtype, t.device) for t in tensors}) <= 1
    plain = all(type(t) in (Tensor, nn.Parameter) for t in tensors)
    return recipe if alike and plain else Recipe(block, (), (), ())


def _is_ruled(block: SqueezableBlock, branch: nn.Module) -> bool:
    return type(branch) in RULES and all(
        getattr(branch, name) == getattr(block, name) for name in GEOMETRY
    )


def recomputed(block: SqueezableBlock, rows: Sequence[int]) -> ConvOperator:
    """The branches of these rows by the algebra, which runs once more in backward."""
    branches = [list(block.branches.values())[row] for row in rows]
    scaling = None if block.scaling is None else block.scaling[list(rows)]
    tensors = [p for branch in branches for p in branch.parameters()]
    tensors += [] if block.scaling is None else [block.scaling]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return squeeze(branches, scaling)
    # checkpoint keeps these tensors: torch then sees an edit of them before backward, and gives the
    # random state of their device back, should a branch draw.
    return checkpoint(lambda *_: squeeze(branches, scaling), *tensors, use_reentrant=False)


def _laid_out_like(parameters: Sequence[Tensor], weight: Tensor) -> Tensor:
    """A kernel of one tap with the strides of the parameters.

    Its memory is the same in every layout, but a conv takes channels_last strides as a wish, and
    would turn the feature maps of a whole net around.
    """
    like = next((p for p in parameters if p.shape == weight.shape), None)
    one_tap = weight.shape[2:].numel() == 1
    if like is None or not one_tap or like.stride()[:2] != (weight.shape[1], 1):
        return weight
    return weight.contiguous().as_strided(weight.shape, like.stride())
