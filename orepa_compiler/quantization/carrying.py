"""Ranges carried over a collapse: the same integers, on steps that the folded norm has scaled.

    W'_o = g_o W_o   =>   round(W'_o / (|g_o| s_o)) = sign(g_o) round(W_o / s_o)

g is read off the two kernels, and checked: where the deployed kernel is not the trained one scaled
by output channel, its rounding was not what was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.classifiers import is_channels_last
from orepa_compiler.errors import ReparamError
from orepa_compiler.quantization.layers import ROUNDED, Rounded, rounded, rounded_layers, unrounded
from orepa_compiler.quantization.quantizers import HALF_TYPES, Quantizer, freeze
from orepa_compiler.rewriting.holding import hold_new, holdings_of
from orepa_compiler.rewriting.swapping import exchange

# How far the deployed kernel may be from the trained one, scaled: float32, composed in float64.
_AGREES = 1e-3


@dataclass(frozen=True)
class Ranges:
    """What one layer was trained with. kernel: (C_out, ...), before it is rounded."""

    input: Quantizer
    weight: Quantizer
    kernel: Tensor
    integers: Tensor


@torch.no_grad()
def ranges_of(model: nn.Module) -> dict[str, Ranges]:
    """The ranges of the layers that round, by path."""
    return {
        path: Ranges(
            copy.deepcopy(layer.input_quantizer),
            copy.deepcopy(layer.weight_quantizer),
            layer.kernel().detach().clone(),
            layer.integers(),
        )
        for path, layer in rounded_layers(model).items()
    }


def without_ranges(model: nn.Module) -> nn.Module:
    """The model with its layers that round as plain ones again, in place."""
    holdings = holdings_of(model)
    for layer in rounded_layers(model).values():
        model = exchange(model, layer, unrounded(layer))
    hold_new(model, holdings)
    return model


@torch.no_grad()
def with_ranges(model: nn.Module, ranges: Mapping[str, Ranges]) -> nn.Module:
    """The collapsed model, in place, with the ranges of the model that it was made of, frozen.

    Its kernels become what the int8 file holds: integers times steps.
    Raises ReparamError where a layer is gone, or its kernel is not the trained one up to a factor
    for each output channel.
    """
    layers = {path: _layer(model, path) for path in ranges}
    made = {path: _carried(layers[path], trained, path) for path, trained in ranges.items()}
    holdings = holdings_of(model)
    for path, layer in layers.items():
        model = exchange(model, layer, made[path])
    hold_new(model, holdings)
    freeze(model)
    return model


def _layer(model: nn.Module, path: str) -> nn.Module:
    found = dict(model.named_modules(remove_duplicate=False)).get(path)
    if found is None or type(found) not in ROUNDED:
        raise ReparamError(
            f"it was trained to be rounded, and the collapsed model has {_named(found)} in its "
            "place; leave it out of fake_quantize with where=",
            path=path,
        )
    return found


def _named(found: nn.Module | None) -> str:
    return "nothing" if found is None else f"a {type(found).__name__}"


def _carried(layer: nn.Module, trained: Ranges, path: str) -> Rounded:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    _check_values(weight, trained.kernel, path)
    factor = _factor(weight.detach().double(), trained.kernel.double(), path)
    quantizer = copy.deepcopy(trained.weight)
    quantizer.scale = torch.where(factor == 0, 1.0, factor.abs()).float() * trained.weight.scale
    shape = (-1, *(1,) * (weight.dim() - 1))
    signs = torch.where(factor == 0, 0.0, factor.sign()).reshape(shape)
    values = trained.integers * signs * quantizer.scale.double().reshape(shape)
    values = values.to(weight.dtype)
    if is_channels_last(weight):
        values = values.contiguous(memory_format=torch.channels_last)
    made = rounded(layer, copy.deepcopy(trained.input), quantizer)
    made._parameters = {**made._parameters, "weight": nn.Parameter(values, weight.requires_grad)}
    return made


def _check_values(deployed: Tensor, trained: Tensor, path: str) -> None:
    if not torch.isfinite(trained).all():
        raise ReparamError(
            "its kernel holds NaN or infinity, so it has no integers; go back to weights from "
            "before the training lost them",
            path=path,
        )
    if not torch.isfinite(deployed).all():
        raise ReparamError(
            "its kernel is finite, and not after the collapse; look for NaN in the norm behind it",
            path=path,
        )
    if deployed.dtype in HALF_TYPES:
        raise ReparamError(
            f"its kernel is {deployed.dtype}, which does not hold integers times steps; collapse "
            "model.float()",
            path=path,
        )


def _factor(deployed: Tensor, trained: Tensor, path: str) -> Tensor:
    """g, (C_out,), of deployed = diag(g) trained. Raises ReparamError where there is none."""
    if deployed.shape != trained.shape:
        raise ReparamError(
            f"its kernel was trained as {tuple(trained.shape)} and is {tuple(deployed.shape)} "
            "after the collapse, so its int8 ranges do not fit; leave it out of fake_quantize",
            path=path,
        )
    own, other = trained.flatten(1), deployed.flatten(1)
    norm = own.square().sum(1)
    factor = torch.where(norm == 0, 1.0, (own * other).sum(1) / norm)
    largest = torch.maximum(other.abs().amax(1), (factor * own.abs().amax(1)).abs())
    error = (other - factor[:, None] * own).abs().amax(1)
    if not (error <= _AGREES * largest).all():
        channel = int((error / largest.clamp_min(torch.finfo(torch.double).tiny)).argmax())
        raise ReparamError(
            "its kernel after the collapse is not the trained one scaled by output channel "
            f"(channel {channel} is off by {error[channel]:.1e} of {largest[channel]:.1e}), so "
            "rounding it is not what was trained; leave it out of fake_quantize with where=",
            path=path,
        )
    return factor
