"""Seeded random weights that keep a deep net's outputs finite, and norms as training leaves them.

Drawing 300 million normal numbers takes seconds, so every tensor is a stretch of one pool.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

_POOL = 2_097_143  # a prime, so that no row of a weight begins where another one did

_LEAST_POWER = 0.1  # of the channels' mean: for a channel that is dead on both images
_TINY = 1e-6


@dataclass(frozen=True)
class Recipe:
    """weight: the size of a layer's output for an input of size 1. bias: the size of a bias."""

    weight: float
    bias: float


# The first that gives finite outputs which depend on the input is taken.
RECIPES = (Recipe(1.0, 0.1), Recipe(1.4, 0.05), Recipe(0.6, 0.1), Recipe(2.0, 0.01))


@lru_cache
def _normal() -> Tensor:
    return torch.randn(_POOL, generator=torch.Generator().manual_seed(0))


@lru_cache
def _uniform() -> Tensor:
    return torch.rand(_POOL, generator=torch.Generator().manual_seed(1))


def warm() -> None:
    """Draw the pools now, so that forked processes share them."""
    _normal(), _uniform()


@torch.no_grad()
def fill(model: nn.Module, seed: str, recipe: Recipe) -> nn.Module:
    """The same model with random parameters and running statistics.

    Weights ~ N(0, 1 / fan_in), biases ~ N(0, 0.01), every gain (norms, layer scales) in
    (0.5, 1.5), also where training would start at zero. running_mean in (-0.5, 0.5) and
    running_var in (0.5, 1.5), until settling makes them fit.
    """
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            _fill(tensor, module, name, f"{seed}/{path}.{name}", recipe)
        for name, low in (("running_mean", -0.5), ("running_var", 0.5)):
            tensor = module._buffers.get(name)
            if tensor is not None:
                _draw(tensor, _uniform(), f"{seed}/{path}.{name}")
                tensor.add_(low)
    return model


@contextmanager
def settling(model: nn.Module) -> Iterator[None]:
    """In the one forward that runs inside, each norm's statistics become of the size of its input.

    running_mean = r u, running_var = r^2 (1 + v) for an input of mean square r^2, u and v in
    (-0.5, 0.5). With statistics that do not fit, a deep net's output is that of its biases alone.
    With the very mean and variance of two images it is chaotic: a change of the last digit grows a
    thousandfold on its way through the layers.
    """
    handles = []
    for path, module in model.named_modules():
        if isinstance(module._buffers.get("running_mean"), Tensor):
            handles.append(module.register_forward_pre_hook(_settle_once(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _settle_once(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    done: list[bool] = []  # a norm that is called again keeps what it saw first

    def settle(module: nn.Module, args: tuple[Any, ...]) -> None:
        mean, var = module._buffers["running_mean"], module._buffers["running_var"]
        assert mean is not None
        assert var is not None
        x: Tensor = args[0]
        if done or x.dim() < 2 or x.shape[1] != len(mean):
            return
        done.append(True)
        with torch.no_grad():
            power = x.detach().transpose(0, 1).flatten(1).square().mean(1)
            power = power.clamp_min(_LEAST_POWER * float(power.mean()) + _TINY)
            shift, factor = torch.empty_like(mean), torch.empty_like(var)
            _draw(shift, _uniform(), f"{path}.running_mean")
            _draw(factor, _uniform(), f"{path}.running_var")
            mean.copy_(power.sqrt() * (shift - 0.5))
            var.copy_(power * (factor + 0.5))

    return settle


def _fill(tensor: Tensor, module: nn.Module, name: str, seed: str, recipe: Recipe) -> None:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return
    is_vector = sum(size > 1 for size in tensor.shape) <= 1
    if is_vector and "bias" in name:
        _draw(tensor, _normal(), seed)
        tensor.mul_(0.5 if "running_mean" in module._buffers else recipe.bias)
    elif is_vector and not _is_weight(module, name):
        _draw(tensor, _uniform(), seed)
        tensor.add_(0.5)
    else:
        _draw(tensor, _normal(), seed)
        tensor.mul_(recipe.weight / _fan_in(tensor, module) ** 0.5)


def _is_weight(module: nn.Module, name: str) -> bool:
    """Whether this is a kernel, though it may have one entry only along all axes but one."""
    kernels = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    return name == "weight" and isinstance(module, kernels)


def _fan_in(tensor: Tensor, module: Any) -> int:
    shape: Any = vars(module).get("weight_shape")
    if shape:  # timm's CondConv2d: experts x flat kernel
        return prod(shape[1:])
    if getattr(module, "transposed", False):
        return max(1, prod(tensor.shape) // tensor.shape[1] // prod(module.stride))
    if isinstance(module, nn.modules.conv._ConvNd):
        return prod(tensor.shape[1:])
    return tensor.shape[-1]


def _draw(tensor: Tensor, pool: Tensor, seed: str) -> None:
    """Copy a stretch of the pool, which begins at a place that the seed gives."""
    size = tensor.numel()
    start = zlib.crc32(seed.encode()) % _POOL
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.new_empty(size)
    done = 0
    while done < size:
        part = pool[start : start + size - done]
        flat[done : done + part.numel()] = part
        done, start = done + part.numel(), 0
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.shape))
