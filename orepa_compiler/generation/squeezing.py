"""Squeezes the branches of a block by the algebra, for branches of any kind.

This is where the cost of re-parameterization falls from O(H W) to O(K_H K_W) (Hu et al. 2022, Sec.
3.3). The package does the same at less cost, and is tested against this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.branches import Branch


def squeeze(branches: Iterable[Branch], scaling: Tensor | None) -> ConvOperator:
    """One operator for parallel branches, each behind its scaling layer.

    W_e = sum_m diag(v_m) W_m                             (Hu et al. 2022, Eq. 4 and Sec. 3.2)

    scaling: (M, C_out) vectors, (M, 1) scalars, or None for no scaling layer.
    """
    with full_precision():
        operators = [branch.operator() for branch in branches]
        if scaling is not None:
            operators = [op.scale(v) for op, v in zip(operators, scaling, strict=True)]
        return reduce(lambda left, right: left.beside(right), operators)


@contextmanager
def full_precision() -> Iterator[None]:
    """Autocast off: kernels are generated in the parameters' own precision and cast once."""
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    if not devices:
        yield
        return
    with torch.autocast(devices[0], enabled=False), torch.autocast(devices[-1], enabled=False):
        yield
