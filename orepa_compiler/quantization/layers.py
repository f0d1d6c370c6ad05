"""Layers that round their kernel and what goes into it: types with the parameters of plain ones.

    y = conv(Q_x(x), Q_W(W)) + b                for a block W = W_e, made at each step as ever

The norm stays behind it: what is folded in later scales the steps of Q_W, and no integer changes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.kernels import sum_biases
from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import (
    ReparamConv,
    ReparamConv1d,
    ReparamConv2d,
    ReparamConv3d,
)
from orepa_compiler.blocks.leaves import call_of
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.errors import NotLinear
from orepa_compiler.quantization.quantizers import Quantizer

ROUNDS = (
    "it rounds its kernel and its maps to int8; orepa.collapse carries the ranges over, and "
    "orepa.drop_ranges gives the layer back that rounds nothing"
)


class Rounded(nn.Module):
    """What layers that round have in common."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer

    def kernel(self) -> Tensor:
        """The kernel before it is rounded, (C_out, ...)."""
        kernel = self.weight
        assert isinstance(kernel, Tensor)
        return kernel

    def integers(self) -> Tensor:
        """The kernel as the int8 file has it, (C_out, ...); times the steps it is what it runs."""
        return self.weight_quantizer.integers(self.kernel().detach())


class _RoundedConv(Rounded, _ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return call_of(self, input)
        kernel = self.weight_quantizer(self.weight)
        y: Tensor = self._conv_forward(self.input_quantizer(input), kernel, self.bias)
        return y


class RoundedConv1d(_RoundedConv, nn.Conv1d):
    """An nn.Conv1d that rounds."""


class RoundedConv2d(_RoundedConv, nn.Conv2d):
    """An nn.Conv2d that rounds."""


class RoundedConv3d(_RoundedConv, nn.Conv3d):
    """An nn.Conv3d that rounds."""


class RoundedLinear(Rounded, nn.Linear):
    """An nn.Linear that rounds."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return call_of(self, input)
        kernel = self.weight_quantizer(self.weight)
        return F.linear(self.input_quantizer(input), kernel, self.bias)


class RoundedBlock(Rounded, ReparamConv):
    """A squeezed block that rounds the kernel its branches make."""

    def kernel(self) -> Tensor:
        return self.store.operator(self).weight

    def as_conv(self) -> ConvOperator:
        return conv_operator(unrounded(self))

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return call_of(self, input)
        return _as_one_conv(self, self.store.operator(self), input)


class RoundedBlock1d(RoundedBlock, ReparamConv1d):
    """A block in the place of an nn.Conv1d that rounds."""


class RoundedBlock2d(RoundedBlock, ReparamConv2d):
    """A block in the place of an nn.Conv2d that rounds."""


class RoundedBlock3d(RoundedBlock, ReparamConv3d):
    """A block in the place of an nn.Conv3d that rounds."""


class RoundedOfflineBlock(Rounded, OfflineBlock):
    """A block whose branches normalize, as the conv that they are by their running statistics.

    Those stay as they are from here on: the kernel that is deployed is trained, and the norms'
    factors and shifts with it.
    """

    def kernel(self) -> Tensor:
        return self.operator().weight

    def as_conv(self) -> ConvOperator:
        return conv_operator(unrounded(self))

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return call_of(self, input)
        return _as_one_conv(self, self.operator(), input)


def _as_one_conv(layer: Any, made: ConvOperator, input: Tensor) -> Tensor:
    made = replace(made, weight=layer.weight_quantizer(made.weight))
    made = made.with_bias(sum_biases(made.bias, layer.own_bias()))
    y = made(layer.input_quantizer(input))
    return y if layer.norm is None else layer.norm(y)


# What can round, by its exact type: a subclass may do anything with its kernel.
ROUNDED: dict[type[nn.Module], type[Rounded]] = {
    nn.Conv1d: RoundedConv1d,
    nn.Conv2d: RoundedConv2d,
    nn.Conv3d: RoundedConv3d,
    nn.Linear: RoundedLinear,
    ReparamConv1d: RoundedBlock1d,
    ReparamConv2d: RoundedBlock2d,
    ReparamConv3d: RoundedBlock3d,
    OfflineBlock: RoundedOfflineBlock,
}
_PLAIN = {rounded: plain for plain, rounded in ROUNDED.items()}


def rounded(layer: nn.Module, input: Quantizer, weight: Quantizer) -> Rounded:
    """The layer with these quantizers: the same parameters, another forward."""
    made = _of_class(ROUNDED[type(layer)], layer)
    made.input_quantizer, made.weight_quantizer = input, weight
    assert isinstance(made, Rounded)
    made.train(layer.training)
    return made


def unrounded(layer: Rounded) -> nn.Module:
    """The layer without its quantizers: the same parameters."""
    plain = _of_class(_PLAIN[type(layer)], layer)
    del plain.input_quantizer, plain.weight_quantizer
    return plain


def rounded_layers(model: nn.Module) -> dict[str, Rounded]:
    """The layers that round, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Rounded)}


def with_float_maps(model: nn.Module, paths: Collection[str]) -> nn.Module:
    """A copy of the model whose layers at these paths round their kernel alone, not their maps.

    So a file has them that keeps them in float32: their kernels came as integers times steps.
    """
    if not paths:
        return model
    made = value_copy(model)
    for path in paths:
        made.get_submodule(path).input_quantizer.disable_fake_quant()  # type: ignore[operator,union-attr]
    return made


def _of_class(cls: type[nn.Module], layer: nn.Module) -> Any:
    made = cls.__new__(cls)
    vars(made).update(vars(layer))
    vars(made)["_modules"] = dict(layer._modules)
    return made


@conv_operator.register(Rounded)
def _(layer: Rounded, in_channels: int | None = None) -> ConvOperator:
    raise NotLinear(ROUNDS)


for _type in (RoundedConv1d, RoundedConv2d, RoundedConv3d, RoundedLinear):
    conv_operator.register(_type, conv_operator.dispatch(Rounded))
for _block in (RoundedBlock1d, RoundedBlock2d, RoundedBlock3d, RoundedOfflineBlock):
    conv_operator.register(_block, conv_operator.dispatch(Rounded))
