"""What a block does to a step at its start, done to the kernel's gradient alone.

A step of SGD on a block's parameters p moves its kernel W_e(p), to first order, by
-rate J J^T dL/dW_e, with J = dW_e/dp. With the J of the start kept, a plain conv whose gradient is
multiplied by J J^T trains as the block linearized at its start, momentum included, at the cost of a
plain net and a product. RepOptimizers (Ding et al. 2023) do this with the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd import grad

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.parts import PartOfBlock
from orepa_compiler.branches import Kernel

# what the default makes of a residual net, where one block has to hold for all kernels
EVERY_SIZE = replace(
    orepa.OREPA,
    branches={**orepa.OREPA.branches, **orepa.OREPA_1X1.branches, "origin": Kernel},
    scaling={**orepa.OREPA_1X1.scaling, **orepa.OREPA.scaling},
)


def preconditioned(net: nn.Module, images: Tensor) -> nn.Module:
    """The plain net whose kernels' gradients are multiplied by J J^T of OREPA's blocks."""
    for weight, jacobian in _jacobians(net):
        weight.register_hook(_multiplying(jacobian @ jacobian.T))
    return net


def diagonally_preconditioned(net: nn.Module, images: Tensor) -> nn.Module:
    """The same with the diagonal of J J^T: a learning rate for each value of a kernel."""
    for weight, jacobian in _jacobians(net):
        weight.register_hook(_scaling(jacobian.square().sum(1).reshape(weight.shape)))
    return net


def _jacobians(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each kernel W_e that a block would make, and dW_e/dp: (values of W_e, values of p)."""
    expanded = orepa.expand(net, block=EVERY_SIZE)
    blocks = {path: m for path, m in expanded.named_modules() if isinstance(m, ConvBlock)}
    return [(net.get_submodule(path).weight, _jacobian(blocks[path])) for path in blocks]  # type: ignore[misc]


def _jacobian(block: ConvBlock) -> Tensor:
    part = PartOfBlock(block, block.branches)
    kernel, parameters = part().flatten(), list(part.parameters())
    each = torch.eye(len(kernel), dtype=kernel.dtype)
    rows = grad(kernel, parameters, each, is_grads_batched=True)
    return torch.cat([row.flatten(1) for row in rows], 1)


def _multiplying(product: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: (product @ gradient.flatten()).reshape(gradient.shape)


def _scaling(rates: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: rates * gradient
