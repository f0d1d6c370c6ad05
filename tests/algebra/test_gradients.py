"""Autograd through a composed kernel is autograd through the sequence it stands for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from orepa_compiler.algebra.operators import ConvOperator
from tests.convolution_reference import assert_same
from tests.operator_factories import GRID, NAMES, attempt, beside, images, random_tensor


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y * y.detach().cos()).sum(), leaves))


@NAMES
def test_gradients_through_the_composed_kernel(name: str) -> None:
    outer = with_leaves(GRID[name])
    inners = [op for op in GRID.values() if op.rank == outer.rank and attempt(outer, op)]
    for plain in inners[::3]:
        inner, side = with_leaves(plain), beside(plain, 1).with_bias(None)
        x = images(inner)[0].requires_grad_()
        leaves = [t for op in (outer, inner) for t in (op.weight, op.bias) if t is not None]
        composed = outer @ inner + outer @ side
        sequence = outer(inner(x)) + outer(side(x))
        for ours, theirs in zip(
            gradients(composed(x), [x, *leaves]), gradients(sequence, [x, *leaves]), strict=True
        ):
            assert_same(ours, theirs, plain)


def with_leaves(op: ConvOperator) -> ConvOperator:
    bias = None if op.bias is None else op.bias.clone().requires_grad_()
    return replace(op, weight=op.weight.clone().requires_grad_(), bias=bias)


def test_gradcheck() -> None:
    weights = [random_tensor(2, 1, *k, seed=s) for s, k in enumerate([(2, 2), (2, 1), (3, 2)])]
    x = random_tensor(1, 2, 5, 4)

    def forward(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, bias: Tensor) -> Tensor:
        inner = ConvOperator(w1, padding=((1, 0), (0, 0)), groups=2)
        outer = ConvOperator(w2, bias, stride=(1, 2), groups=2)
        return (outer @ inner + ConvOperator(w3, None, (1, 2), ((1, 0), (0, 0)), groups=2))(x)

    inputs = [t.requires_grad_() for t in (x, *weights, random_tensor(2))]
    assert torch.autograd.gradcheck(forward, inputs)
