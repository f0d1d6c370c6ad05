"""Statistics for inserted norms, from data, so that train mode starts as the same function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.offline import branch_norms
from orepa_compiler.capture.effects.randomness import random_state_kept
from orepa_compiler.validation.state import state_kept
from orepa_compiler.verification.evaluation import batches_of, evaluation_mode, run_to


@dataclass
class _Moments:
    """Count, sum and sum of squares per channel, in float64."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor) -> None:
        x = x.detach().double()
        axes = [0, *range(2, x.dim())]
        self.count += x.numel() // x.shape[1]
        self.total = self.total.to(x.device) + x.sum(axes)
        self.square = self.square.to(x.device) + x.square().sum(axes)


def inserted_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The norms that expand inserted, behind blocks and in their branches, by path."""
    found: dict[str, _BatchNorm] = {}
    for path, block in model.named_modules():
        if isinstance(block, ConvBlock):
            behind = [("norm", block.norm)] if isinstance(block.norm, _BatchNorm) else []
            norms = [*branch_norms(block), *behind]
            found.update({f"{path}.{name}" if path else name: norm for name, norm in norms})
    return found


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Any) -> None:
    """Gives each inserted norm the statistics of its input on these batches.

    running_mean = m, running_var = s^2, weight = a sqrt(s^2 + eps), bias = a m + b: the function
    stays the same in eval mode and, up to the variation of batches, in train mode.
    x -> a x + b: what the norm did before, the identity but for b when it was just inserted. A norm
    that the batches do not reach stays as it is.
    """
    norms = inserted_norms(model)
    moments = {path: _Moments() for path in norms}
    with random_state_kept(), state_kept(model), evaluation_mode(model), _watching(norms, moments):
        for index, batch in enumerate(batches_of(inputs)):
            run_to("calibrate", model, batch, index)
    for path, norm in norms.items():
        if moments[path].count:
            _settle(norm, moments[path])


def _settle(norm: _BatchNorm, seen: _Moments) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean = seen.total / seen.count
    var = (seen.square / seen.count - mean.square()).clamp_min(0.0)
    slope = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    bias = norm.bias.double() + slope * (mean - norm.running_mean.double())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    norm.weight.copy_(slope * (var + norm.eps).sqrt())
    norm.bias.copy_(bias)


@contextmanager
def _watching(norms: dict[str, _BatchNorm], moments: dict[str, _Moments]) -> Iterator[None]:
    handles = [
        norm.register_forward_pre_hook(lambda module, args, path=path: moments[path].add(args[0]))
        for path, norm in norms.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
