"""Makes a linear block of the branches of a sum, norms and all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.kernels import sum_biases
from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.analysis.chains import Chain, Layer, SummedOperator, summed
from orepa_compiler.blocks import LINEARIZED, Block, LinearBlock, inserted_norm
from orepa_compiler.blocks.offline import OfflineBlock, OfflineBranch
from orepa_compiler.branches import Identity, Kernel, SequenceBranch
from orepa_compiler.branches.sequences import FixedKernel, LayerSequence, trained_kernel


def linear_block(whole: SummedOperator, like: Tensor, *, with_norm: bool) -> LinearBlock:
    """The block that computes a sum of branches: scaling layers, and one norm behind.

    v_m = the product of what the norms at the end of branch m multiply by

    What the norms add, carried to the end of their branches, is the bias of the norm behind, or of
    the block where there is none (with_norm=False). like: gives dtype and device.
    """
    parts = [_branch(chain, whole, like) for chain in whole.chains]
    names = _names([branch for branch, _ in parts], whole)
    makers = {name: _always(branch) for name, (branch, _) in zip(names, parts, strict=True)}
    norm = inserted_norm(whole, like) if with_norm else None
    conv: Any = _bare(whole, like).to_module()
    block = LinearBlock(conv, Block(LINEARIZED, makers, {}), norm=norm)
    block.scaling = nn.Parameter(torch.stack([factor for _, factor in parts]))
    if whole.bias is not None:
        shift = nn.Parameter(whole.bias.detach().to(like))
        if norm is None:
            block._parameters["bias"] = shift  # a block takes none by name
        else:
            norm.bias = shift
    layers = [layer for chain in whole.chains for layer in chain]
    if not any(layer.operator.weight.requires_grad for layer in layers):
        block.requires_grad_(False)
    return block


def _offline_branches(block: OfflineBlock) -> list[OfflineBranch]:
    return [branch for branch in block.branches.values() if isinstance(branch, OfflineBranch)]


def linearized(block: OfflineBlock, *, with_norm: bool) -> LinearBlock:
    """The linear form of an offline block: the same branches, names and layers."""
    exact = copy.deepcopy(block).double()
    operator = exact.operator()
    operator = operator.with_bias(sum_biases(operator.bias, exact.own_bias()))
    whole = summed(operator, *(_offline_chain(branch) for branch in _offline_branches(exact)))
    new = linear_block(whole, next(block.parameters()), with_norm=with_norm)
    made = zip(block.branches, _offline_branches(block), new.branches.values(), strict=True)
    new.branches = nn.ModuleDict(
        {name: old.branch if len(old.norms) == 1 else branch for name, old, branch in made}
    )
    return new.train(block.training)


def _offline_chain(branch: OfflineBranch) -> Chain:
    chain: list[Layer] = []
    for conv, norm in zip(branch.layers(), branch.norms, strict=True):
        is_fixed = not conv.weight.requires_grad
        chain.append(Layer("conv", conv, path="branch", is_fixed=is_fixed))
        chain.append(Layer("norm", conv_operator(norm), path="norm", is_norm=True))
    return tuple(chain)


def _branch(chain: Chain, whole: ConvOperator, like: Tensor) -> tuple[SequenceBranch, Tensor]:
    """A branch, and what the norms at its end multiply by: the factors of its scaling layer.

    Biases are left out: they went through the branch to the bias of the sum.
    """
    layers = list(chain)
    factors = [whole.weight.new_ones(whole.out_channels)]
    while layers and layers[-1].is_scaling:
        factors.append(layers.pop().operator.weight.detach().flatten())
    parts = [
        FixedKernel(_bare(operator, like))
        if is_fixed
        else trained_kernel(_bare(operator, like), trains=operator.weight.requires_grad)
        for operator, is_fixed in _kernels(layers, whole.rank)
    ]
    factor = reduce(torch.mul, factors).to(like)
    if not parts:
        return Identity(_bare(whole, like)), factor
    return parts[0] if len(parts) == 1 else LayerSequence(_bare(whole, like), parts), factor


def _kernels(layers: list[Layer], rank: int) -> Iterator[tuple[ConvOperator, bool]]:
    """The convs of a branch, without biases, and whether each is fixed.

    What stands between two convs (norms, padding) becomes one scaling layer.
    """
    for has_kernel, run in groupby(layers, key=lambda layer: layer.has_kernel):
        group = list(run)
        operators = [layer.operator.with_rank(rank).with_bias(None) for layer in group]
        if has_kernel:
            yield from zip(operators, (layer.is_fixed for layer in group), strict=True)
        else:
            one = reduce(lambda inner, outer: outer.after(inner), operators)
            yield one, all(layer.is_fixed for layer in group)


def _bare(operator: ConvOperator, like: Tensor) -> ConvOperator:
    """The operator without its bias, in the precision of the model."""
    return replace(operator, weight=operator.weight.detach().to(like), bias=None)


def _names(branches: list[SequenceBranch], whole: SummedOperator) -> list[str]:
    """Names by what the branches are, those of OREPA's where they are the same.

    The first full-size kernel is the origin.
    """
    pairs = zip(branches, whole.chains, strict=True)
    bases = [_name(branch, chain, whole) for branch, chain in pairs]
    counts = [bases[: index + 1].count(base) for index, base in enumerate(bases)]
    return [b if n == 1 else f"{b}_{n}" for b, n in zip(bases, counts, strict=True)]


def _name(branch: SequenceBranch, chain: Chain, whole: ConvOperator) -> str:
    if isinstance(branch, Kernel) and branch.weight.shape == whole.weight.shape:
        return "origin"
    convs = [layer for layer in chain if layer.has_kernel]
    kinds = [_kind(layer, whole) for layer in convs]
    if kinds == ["kernel"]:  # beside the origin: 1 x k, k x 1, a smaller or a dilated one
        return "kernel_" + "x".join(map(str, convs[0].operator.kernel_size))
    name = "_".join(kinds) or "identity"
    return "average" if name == "pointwise_average" else name


def _kind(layer: Layer, whole: ConvOperator) -> str:
    conv = layer.operator
    if layer.is_fixed:
        return "average"
    if prod(conv.kernel_size) == 1:
        return "pointwise"
    is_depthwise = conv.groups == conv.in_channels > whole.groups
    return "depthwise" if is_depthwise else "kernel"


def _always(branch: nn.Module) -> Any:
    return lambda conv: branch
