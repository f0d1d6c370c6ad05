"""Compiles the making of all kernels of a model into one function.

Block by block, a GPU waits for launches and not for arithmetic. Compiled as a whole, the passes of
a kernel become one, and so do those of its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.generation import SqueezableBlock, generate

Pair = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class _Compiled:
    """The function for these blocks. geometry: their operators, of which the weights are old."""

    blocks: tuple[SqueezableBlock, ...]
    geometry: tuple[ConvOperator, ...]
    make: Callable[[], list[Pair]]
    mode: str | None


_compiled: WeakKeyDictionary[nn.Module, _Compiled] = WeakKeyDictionary()


def generate_all(
    model: nn.Module, blocks: Sequence[SqueezableBlock], *, mode: str | None = None
) -> list[ConvOperator]:
    """The operators of the model's blocks, as `generate` gives them, made by one function.

    It is compiled at the first call for a model, and kept for as long as the model has these
    blocks. mode: of torch.compile; in "reduce-overhead" it runs as a CUDA graph, whose kernels are
    copied out, since the next run writes over them.
    """
    known = _compiled.get(model)
    if known is None or known.mode != mode or not _are_same(known.blocks, blocks):
        known = _compiled[model] = _compile(tuple(blocks), mode)
    made = [(_laid_out(weight), bias) for weight, bias in known.make()]
    if mode is not None:
        made = [(weight.clone(), None if b is None else b.clone()) for weight, b in made]
    pairs = zip(known.geometry, made, strict=True)
    return [replace(like, weight=weight, bias=bias) for like, (weight, bias) in pairs]


def _laid_out(weight: Tensor) -> Tensor:
    """The weight with the strides of one that was made eagerly.

    A compiled function may give any stride to an axis of length one. By these a conv decides how
    its maps lie: it then puts channels last, where torch 2.13 is slower, and its backward of a
    1 x 1 conv with stride 2 writes beyond its memory.
    """
    return weight.flatten().view(weight.shape) if weight.is_contiguous() else weight


def _compile(blocks: tuple[SqueezableBlock, ...], mode: str | None) -> _Compiled:
    def make() -> list[Pair]:
        made = [generate(block) for block in blocks]
        return [(operator.weight, operator.bias) for operator in made]

    with torch.no_grad():
        geometry = tuple(_empty(generate(block)) for block in blocks)
    compiled = torch.compile(make, fullgraph=True, dynamic=False, mode=mode)
    return _Compiled(blocks, geometry, compiled, mode)


def _empty(operator: ConvOperator) -> ConvOperator:
    """The operator without its values."""
    return replace(operator, weight=operator.weight.to("meta"), bias=None)


def _are_same(left: Sequence[SqueezableBlock], right: Sequence[SqueezableBlock]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
