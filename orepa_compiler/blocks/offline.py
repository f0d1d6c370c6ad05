"""Runs branches that normalize, and so cannot be squeezed, on feature maps at each step.

    y = sum_m N_mn(W_mn * ... N_m1(W_m1 * x)) + b                    (Hu et al. 2022, Fig. 3, left)

This is the form that linearization starts from. In train mode each norm divides by the statistics
of its own branch, so no kernel can be made of the sum; in eval mode it is one conv.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.blocks import Block, BranchSum, ConvBlock, SqueezedSum, identity_norm
from orepa_compiler.branches import SequenceBranch


class OfflineBranch(nn.Module):
    """A branch on feature maps, with a BatchNorm behind each of its layers.

    A padded layer behind a norm sees, beyond the border, what the norm makes of zeros by its
    running statistics (Ding et al. 2021, DBB, Sec. 3.2): so the branch is one conv in eval mode.
    Their code stops the gradient there; here it is that of the function. A branch that is a sum of
    branches is squeezed, and is one layer.
    """

    def __init__(self, branch: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.branch = SqueezedSum(branch) if isinstance(branch, BranchSum) else branch
        rank = like.dim() - 2
        norms = [identity_norm(rank, channels, like) for channels in self.widths(like)]
        self.norms = nn.ModuleList(norms)

    def widths(self, like: Tensor) -> list[int]:
        """The channels behind each layer, the innermost first; like: the kernel of the conv."""
        if isinstance(self.branch, SqueezedSum):
            return [like.shape[0]]  # without its kernel, which nothing needs yet
        return [layer.out_channels for layer in self.layers()]

    def layers(self) -> tuple[ConvOperator, ...]:
        """The convs between the norms, the innermost first."""
        if isinstance(self.branch, SequenceBranch):
            return self.branch.layers()
        if isinstance(self.branch, SqueezedSum):
            return (self.branch.store.operator(self.branch),)
        return (self.branch.operator(),)  # type: ignore[operator]

    def operator(self) -> ConvOperator:
        """The branch as one conv, by the norms' running statistics."""
        total: ConvOperator | None = None
        for layer, norm in zip(self.layers(), self.norms, strict=True):
            if total is not None:
                bias = layer.bias_after(total.bias)  # also at the border, which holds norm(0)
                layer = layer.after(total.with_bias(None)).with_bias(bias)
            total = conv_operator(norm).after(layer)
        assert total is not None
        return total

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers()
        if isinstance(self.branch, SequenceBranch) and len(layers) == 1:
            (norm,) = self.norms
            y: Tensor = norm(self.branch(x))  # the identity has no conv to run
            kind = x.device.type
            is_cast = torch.is_autocast_enabled(kind)  # as it casts what the convs beside it give
            return y.to(torch.get_autocast_dtype(kind)) if is_cast else y
        for number, (layer, norm) in enumerate(zip(layers, self.norms, strict=True)):
            if number and layer.has_padding:
                x, layer = _shifted(x, layer, self.norms[number - 1])
            x = norm(layer(x))
        return x


class OfflineBlock(ConvBlock):
    """A block whose branches each end in a norm of their own; linear in eval mode alone."""

    def __init__(self, conv: _ConvNd, block: Block, *, norm: nn.Module | None = None) -> None:
        super().__init__(conv, block, normalized_branches, norm=norm)


def normalized_branches(conv: ConvOperator, block: Block) -> dict[str, nn.Module]:
    """Makes the branches of a block for a conv, with a norm behind each of their layers."""
    branches = block.make(conv)
    return {name: OfflineBranch(branch, conv.weight) for name, branch in branches.items()}


def branch_norms(block: ConvBlock) -> Iterator[tuple[str, _BatchNorm]]:
    """The norms inside an offline block, with their paths in it."""
    if isinstance(block, OfflineBlock):
        for name, branch in block.branches.items():
            assert isinstance(branch, OfflineBranch)
            for number, norm in enumerate(branch.norms):
                assert isinstance(norm, _BatchNorm)
                yield f"branches.{name}.norms.{number}", norm


def features_cost(block: OfflineBlock) -> float:
    """Counts what the branches cost on feature maps, as a multiple of what the conv costs alone."""
    macs = 0
    for branch in block.branches.values():
        assert isinstance(branch, OfflineBranch)
        places = 1  # of a layer, for each place of the output
        for layer in reversed(branch.layers()):
            macs += layer.macs * places
            places *= torch.Size(layer.stride).numel()
    return macs / block.operator().weight.numel()


def _shifted(x: Tensor, layer: ConvOperator, norm: nn.Module) -> tuple[Tensor, ConvOperator]:
    """Shifts x so that zero padding does what padding with s = norm(0) would: x - s, bias W s.

    Only zeros need it; other paddings repeat what is inside.
    """
    if layer.padding_mode != "zeros":
        return x, layer
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean = norm.running_mean.clone()  # the next pass moves it, perhaps before backward
    shift = norm.bias - mean * norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    constant = identity(len(shift), layer.rank, like=shift).with_bias(shift)
    layer = layer.with_bias(layer.bias_after(constant.bias))
    return x - shift.reshape(1, -1, *(1,) * layer.rank), layer
