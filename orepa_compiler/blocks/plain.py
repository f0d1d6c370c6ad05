"""Builds the plain conv that a block stands for, with its branches collapsed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.classifiers import is_channels_last
from orepa_compiler.algebra.operators import CONV_MODULES, ConvOperator


class Stands(Protocol):
    """A block, as far as it is asked here."""

    training: bool

    def plain(self) -> nn.Module: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


def plain_conv(block: Stands) -> nn.Module:
    """The conv that a block stands for: its own geometry, branches collapsed, norm folded in.

    Composed in float64 and cast once. Raises NotLinear where the block's norm is not affine.
    """
    exact = copy.deepcopy(block)
    cast(nn.Module, exact).double()
    return like(exact.plain(), list(block.parameters())).train(block.training)


def conv_with(operator: ConvOperator, block: Any) -> nn.Module:
    """A conv with the kernel and the bias of an operator, and the settings of a block."""
    conv = CONV_MODULES[operator.rank](
        block.in_channels,
        block.out_channels,
        block.kernel_size,
        block.stride,
        block.padding,
        block.dilation,
        block.groups,
        operator.bias is not None,
        block.padding_mode,
        device="meta",
    )
    conv.weight = nn.Parameter(operator.weight.detach())
    if operator.bias is not None:
        conv.bias = nn.Parameter(operator.bias.detach())
    return conv


def like(module: nn.Module, parameters: list[nn.Parameter]) -> nn.Module:
    """Gives a module the dtype, memory format and requires_grad of what it replaces."""
    kernels = [p for p in parameters if p.dim() > 2] or parameters
    channels_last = any(is_channels_last(p) for p in kernels)
    wanted = any(p.requires_grad for p in parameters)
    for layer in module.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            value: Tensor = parameter.detach().to(kernels[0].dtype)
            if channels_last and value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            setattr(layer, name, nn.Parameter(value, requires_grad=wanted))
        for name, buffer in list(layer.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(layer, name, buffer.to(kernels[0].dtype))
    return module
