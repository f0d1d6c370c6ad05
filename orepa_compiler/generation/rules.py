"""Makes the kernels of the paper's branches, and their gradients, in few passes over memory.

Each rule answers for all branches of one kind in a block: it adds their scaled kernels to a sum,
and gives the gradients of their scaling factors and parameters. It computes what the algebra of
`squeeze` computes, and needs nothing but the parameters to do so.

A kernel here is (C_out, C_in / groups, taps), in any memory layout. o counts output channels, i the
input channels of a group, t the channels between two layers, k taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from orepa_compiler.branches import (
    DEPTHWISE_MULTIPLIER,
    AveragePool,
    DepthwisePointwise,
    FrequencyFilter,
    Geometry,
    Kernel,
    Pointwise,
    PointwiseKernel,
    PointwisePointwise,
)
from orepa_compiler.generation.channelwise import dot, scale_, scaled
from orepa_compiler.generation.contraction import (
    contract,
    gradient_of_inner,
    gradient_of_outer,
    is_taps_major,
)
from orepa_compiler.generation.separable import add_separable, separable_gradients


@dataclass(frozen=True)
class Term:
    """A branch in its block: the factor of its scaling layer, (C_out,) or (1,), and parameters."""

    branch: Geometry
    factor: Tensor | None
    parameters: tuple[Tensor, ...]

    def beside(self, total: Tensor, value: Tensor) -> Tensor:
        """total, in place, and beside it value, (C_out, i, k), behind the scaling layer."""
        if self.factor is None:
            return total.add_(value)
        return total.addcmul_(value, self.factor.reshape(-1, 1, 1))

    def factor_gradient(self, value: Tensor, grad: Tensor) -> Tensor | None:
        """<value, grad> for each output channel, where there is a factor."""
        return None if self.factor is None else dot(value, grad)


@dataclass(frozen=True)
class TermGradient:
    """What a term gets back.

    factor: one number per output channel, or None without a factor. parameters: with the elements
    of each parameter in their order, in a shape that may be flatter.
    """

    factor: Tensor | None
    parameters: tuple[Tensor, ...]


class KernelRule(Protocol):
    """How the branches of one kind make their kernels."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of a branch's parameters."""
        ...

    def add(self, total: Tensor | None, terms: Sequence[Term]) -> Tensor:
        """total + sum_m v_m W_m, total in place."""
        ...

    def gradients(self, grad: Tensor, terms: Sequence[Term]) -> list[TermGradient]:
        """The terms' gradients, from the gradient of the sum."""
        ...


class FullKernel:
    """W = w:  dw = v G,  dv = <w, G>."""

    names = ("weight",)

    def add(self, total: Tensor | None, terms: Sequence[Term]) -> Tensor:
        for term in terms:
            weight = term.parameters[0].flatten(2)
            total = scaled(weight, term.factor) if total is None else term.beside(total, weight)
        assert total is not None
        return total

    def gradients(self, grad: Tensor, terms: Sequence[Term]) -> list[TermGradient]:
        return [
            TermGradient(
                term.factor_gradient(term.parameters[0].flatten(2), grad),
                (scaled(grad, term.factor),),
            )
            for term in terms
        ]


class OneTap:
    """W[o, i, k] = w[o, i] F[o, k], with fixed filters F.

    g[o, i] = sum_k G F:  dw = v g,  dv = <w, g>. All of a block's filters are one small product.
    """

    names = ("weight",)

    def add(self, total: Tensor | None, terms: Sequence[Term]) -> Tensor:
        weights = torch.stack([term.parameters[0].flatten(1) for term in terms], 1)
        filters = _filters(terms)
        for number, term in enumerate(terms):
            if term.factor is not None:
                filters[:, number].mul_(term.factor.unsqueeze(1))
        if total is None:
            return torch.bmm(weights.transpose(1, 2), filters)
        if is_taps_major(total):
            total.transpose(1, 2).baddbmm_(filters.transpose(1, 2), weights)
        else:
            total.baddbmm_(weights.transpose(1, 2), filters)
        return total

    def gradients(self, grad: Tensor, terms: Sequence[Term]) -> list[TermGradient]:
        gathered = torch.bmm(_filters(terms), grad.transpose(1, 2))
        found = []
        for own, term in zip(gathered.unbind(1), terms, strict=True):
            factor = term.factor_gradient(term.parameters[0].flatten(1), own)
            found.append(TermGradient(factor, (scaled(own, term.factor),)))
        return found


class Contraction:
    """W[o, i, k] = sum_t K[o, t, k] D[t, i]:  H = G D^T,  dK = v H,  dv = <K, H>,  dD = (v K)^T G.

    names: of D, then of K. has_identity: D is stored as its difference from the identity.
    """

    def __init__(self, names: tuple[str, str], *, has_identity: bool) -> None:
        self.names, self.has_identity = names, has_identity

    def add(self, total: Tensor | None, terms: Sequence[Term]) -> Tensor:
        for term in terms:
            outer, inner = self._layers(term)
            made = contract(outer, inner, term.branch.groups)
            total = scale_(made, term.factor) if total is None else term.beside(total, made)
        assert total is not None
        return total

    def gradients(self, grad: Tensor, terms: Sequence[Term]) -> list[TermGradient]:
        return [self._gradient(grad, term) for term in terms]

    def _layers(self, term: Term) -> tuple[Tensor, Tensor]:
        inner = term.parameters[0].flatten(1)
        if self.has_identity:
            inner = inner.clone()
            inner.unflatten(0, (-1, inner.shape[1])).diagonal(dim1=1, dim2=2).add_(1)
        return term.parameters[1].flatten(2), inner

    def _gradient(self, grad: Tensor, term: Term) -> TermGradient:
        outer, inner = self._layers(term)
        groups = term.branch.groups
        back = gradient_of_outer(grad, inner, groups)
        factor = term.factor_gradient(outer, back)
        first = gradient_of_inner(grad, outer, term.factor, groups)
        return TermGradient(factor, (first, scale_(back, term.factor)))


class Separable:
    """W[o, i, k] = sum_j p[o, i, j] d[i, j, k], as in `separable`."""

    names = ("depthwise", "pointwise")

    def add(self, total: Tensor | None, terms: Sequence[Term]) -> Tensor:
        for term in terms:
            depthwise, pointwise, factor = _separable(term)
            if total is None:
                rows, width = term.parameters[1].shape[0], pointwise.shape[2]
                total = depthwise.new_zeros(rows, width, depthwise.shape[2])
            split = total.unflatten(0, (term.branch.groups, -1))
            add_separable(split, depthwise, pointwise, factor)
        assert total is not None
        return total

    def gradients(self, grad: Tensor, terms: Sequence[Term]) -> list[TermGradient]:
        found = []
        for term in terms:
            split = grad.unflatten(0, (term.branch.groups, -1))
            of_factor, *others = separable_gradients(split, *_separable(term))
            own = None if term.factor is None else of_factor.flatten()
            found.append(TermGradient(own, tuple(others)))
        return found


# By exact type: a subclass may have a kernel of its own.
_one_tap = OneTap()
RULES: dict[type, KernelRule] = {
    PointwiseKernel: Contraction(("pointwise", "kernel"), has_identity=True),
    PointwisePointwise: Contraction(("first", "second"), has_identity=False),
    Kernel: FullKernel(),
    Pointwise: _one_tap,
    AveragePool: _one_tap,
    FrequencyFilter: _one_tap,
    DepthwisePointwise: Separable(),
}


def _filters(terms: Sequence[Term]) -> Tensor:
    """The fixed filters of one-tap branches, (C_out, branches, k)."""
    first, weight = terms[0].branch, terms[0].parameters[0]
    filters = weight.new_zeros(weight.shape[0], len(terms), *first.kernel_size)
    centre: tuple[int, ...] = tuple((size - 1) // 2 for size in first.kernel_size)
    for number, term in enumerate(terms):
        if isinstance(term.branch, FrequencyFilter):
            filters[:, number] = term.branch.prior[:, 0]
        elif isinstance(term.branch, AveragePool):
            filters[:, number] = 1 / prod(first.kernel_size)
        else:
            filters[:, number].movedim(0, -1)[centre] = 1.0
    return filters.flatten(2)


def _separable(term: Term) -> tuple[Tensor, Tensor, Tensor]:
    """depthwise, pointwise and factor, in the shapes that `separable` asks for."""
    depthwise, pointwise = term.parameters
    rows, groups = pointwise.shape[0], term.branch.groups
    factor = pointwise.new_ones(1) if term.factor is None else term.factor
    return (
        depthwise.reshape(-1, DEPTHWISE_MULTIPLIER, prod(depthwise.shape[2:])),
        pointwise.reshape(groups, rows // groups, -1, DEPTHWISE_MULTIPLIER),
        factor.expand(rows).reshape(groups, rows // groups, 1, 1),
    )
