"""Inputs made beside the user's own: random, constant, large and small ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orepa_compiler.verification.evaluation import Batch
from orepa_compiler.verification.nesting import map_tensors

# Times the user's own amplitude. Ten times an image in units of its standard deviation is beyond
# any real one, and still within what float16 holds in most nets.
LARGE, SMALL = 10.0, 0.01


def made_batches(batch: Batch) -> dict[str, Batch]:
    """By name, batches of the same shapes and dtypes; floating tensors alone are changed.

    random: normal, with the mean and deviation of the tensor. constant: its mean plus its
    deviation, so that each conv sees nothing but its own border. large, small: LARGE and SMALL
    times the tensor. Empty where the batch holds no floating tensor.
    """
    generator = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return noise * _deviation(tensor) + _mean(tensor)

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "random": random,
        "constant": lambda t: torch.full_like(t, _mean(t) + _deviation(t)),
        "large": lambda t: t * LARGE,
        "small": lambda t: t * SMALL,
    }
    made = {}
    for name, change in changes.items():
        changed: list[Tensor] = []

        def apply(tensor: Tensor, change: Callable[[Tensor], Tensor] = change) -> Tensor:
            if not tensor.is_floating_point() or not tensor.numel():
                return tensor
            changed.append(tensor)  # noqa: B023
            return change(tensor).to(tensor)

        result = map_tensors(batch, apply)
        if changed:
            made[name] = result
    return made


def _mean(tensor: Tensor) -> float:
    return float(tensor.double().mean())


def _deviation(tensor: Tensor) -> float:
    # A constant input has none: 1 then, so that something varies.
    return float(tensor.double().std(unbiased=False)) or 1.0
