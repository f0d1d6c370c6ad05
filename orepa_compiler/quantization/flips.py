"""Bounds what float32 may change in a model that rounds: a value between two steps falls apart.

Two right computations of one map differ by the rounding of float32. Behind a quantizer that is
nothing, or a whole step. So the noise of such a model is drawn: every map that is rounded is moved
by a small part of a step first, in copies of the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.quantization.layers import rounded_layers
from orepa_compiler.verification import Samples
from orepa_compiler.verification.evaluation import Side, evaluate

# In steps: a sum of some hundred products in float32, of values up to 127 steps, is off by less.
JITTER = 1e-3
# How often the noise is drawn.
DRAWS = 2

NOISE_NAME = "float32 in front of the rounding to int8"


def with_flips(samples: Samples, model: nn.Module) -> Samples:
    """The samples of a model that rounds, with the noise of values that fall on another step."""
    if not rounded_layers(model):
        return samples
    sides = [Side("noise of int8", jittered(model, seed)) for seed in range(DRAWS)]
    noisy = [evaluate(side, samples.batches) for side in sides]
    truth = replace(samples.truth, noisy=[*samples.truth.noisy, *noisy], noise_name=NOISE_NAME)
    return replace(samples, truth=truth)


def jittered(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model whose maps are moved by up to JITTER steps before they are rounded."""
    moved = value_copy(model)
    generator = torch.Generator().manual_seed(seed)

    def move(quantizer: nn.Module, args: tuple[Tensor, ...]) -> Any:
        (x,) = args
        noise = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
        return (x + noise * JITTER * quantizer.scale.to(x),)  # type: ignore[operator]

    for layer in rounded_layers(moved).values():
        layer.input_quantizer.register_forward_pre_hook(move)
    return moved.eval()
