"""Gives blocks to convs with a forward of their own: standardized, padded by size, transposed.

Their kernel is one thing, what they do with it another. A block replaces the kernel alone: the one
that its branches make goes into the conv's own forward, which stays the user's.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.classifiers import own_forward_reason
from orepa_compiler.algebra.layers import conv_operator, kernel_operator
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import Block, ReparamConv
from orepa_compiler.blocks.leaves import call_of
from orepa_compiler.errors import NotLinear


class OwnForwardConv(ReparamConv):
    """A squeezed block in the place of a conv with a forward of its own.

    y = forward_conv(x; W_e, b)

    For a transposed conv, W_e is the kernel of the conv that it is the adjoint of. Its conv holds
    everything but the kernel and the bias.
    """

    def __init__(self, conv: _ConvNd, block: Block) -> None:
        super().__init__(conv, block)
        self.conv = _without_kernel(conv)

    @staticmethod
    def read(conv: _ConvNd) -> ConvOperator:
        return kernel_operator(conv)

    def as_conv(self) -> ConvOperator:
        """The kernel and the bias that the conv's own forward is given."""
        return self.operator().with_bias(self.own_bias())

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(input, fx.Proxy):
            return call_of(self, input, *args, **kwargs)
        kernel = {"weight": self.store.operator(self).weight}
        bias = self.own_bias()
        if bias is not None:
            kernel["bias"] = bias
        output: Tensor = functional_call(self.conv, kernel, (input, *args), kwargs)
        return output

    def plain(self) -> nn.Module:
        """The conv of the user's class, with the kernel that the branches make."""
        conv = copy.deepcopy(self.conv)
        made = self.as_conv()
        bias = None if made.bias is None else nn.Parameter(made.bias.detach().clone())
        conv.weight = nn.Parameter(made.weight.detach().clone())
        conv.register_parameter("bias", bias)
        return conv


def own_conv(module: nn.Module) -> nn.Module:
    """The conv whose forward a module runs: what the block stands for, or the module itself."""
    return module.plain() if isinstance(module, OwnForwardConv) else module


def _without_kernel(conv: _ConvNd) -> nn.Module:
    """The conv with its other parameters and settings, which it shares with the original."""
    shell = conv.__class__.__new__(conv.__class__)
    vars(shell).update(vars(conv))
    others = {name: p for name, p in conv._parameters.items() if name not in ("weight", "bias")}
    shell._parameters = {**others, "bias": None}
    return shell


@conv_operator.register(OwnForwardConv)
def _(layer: OwnForwardConv, in_channels: int | None = None) -> ConvOperator:
    raise NotLinear(own_forward_reason(layer.conv) or "its conv has a forward of its own")
