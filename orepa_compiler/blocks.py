"""Blocks: which branches stand in for a conv, and the modules that hold them.

A Block is a value: names, and for each a function from the conv's operator to a branch, or None
where the branch does not apply. LinearBlock runs its branches on feature maps; ReparamConv, its
squeezed form, runs one conv.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.branches import (
    AveragePool,
    DepthwisePointwise,
    FrequencyFilter,
    Geometry,
    Kernel,
    Pointwise,
    PointwiseKernel,
    PointwisePointwise,
    SequenceBranch,
)
from orepa_compiler.composition import sum_biases
from orepa_compiler.errors import NotLinear
from orepa_compiler.generation import generate
from orepa_compiler.generation.store import KernelStore
from orepa_compiler.layers import conv_operator
from orepa_compiler.operators import ConvOperator

BranchMaker = Callable[[ConvOperator], "nn.Module | None"]
Scaling = Literal["vector", "scalar", "none"]

# The kernel that is a large stem (Hu et al. 2022, Sec. 3.5) is at least this wide.
LARGE_KERNEL = 7
# A stem reads images; stacked convs in the place of a wide large kernel would dwarf it.
STEM_CHANNELS = 16
# The block name of what linearize makes: the branches that were there, in linear form.
LINEARIZED = "LINEARIZED"

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Block:
    """What a conv becomes in training: named branches, and what their scaling layers start from.

    branches: name -> function from the conv's operator to a branch module (None: not applicable).
    scaling: name -> initial scaling factor; 1 where a name is absent.
    scaling_layer: a vector per branch, one scalar per branch, or none (Hu et al. 2022, Table 3).
    """

    name: str
    branches: Mapping[str, BranchMaker]
    scaling: Mapping[str, float]
    scaling_layer: Scaling = "vector"

    def make(self, conv: ConvOperator) -> dict[str, nn.Module]:
        """Fresh branches for a conv, those that apply."""
        made = {name: maker(conv) for name, maker in self.branches.items()}
        return {name: branch for name, branch in made.items() if branch is not None}


class BranchSum(Geometry):
    """Parallel branches, each ending in its scaling layer: a branch itself, so blocks nest."""

    scaling: nn.Parameter | None

    def __init__(self, conv: ConvOperator, block: Block) -> None:
        super().__init__(conv)
        branches = block.make(conv)
        self.block_name, self.scaling_layer = block.name, block.scaling_layer
        self.branches = nn.ModuleDict(branches)
        columns = {"vector": conv.out_channels, "scalar": 1, "none": 0}[block.scaling_layer]
        if columns:
            factors = conv.weight.new_tensor([block.scaling.get(name, 1.0) for name in branches])
            self.scaling = nn.Parameter(factors.unsqueeze(1).repeat(1, columns))
        else:
            self.register_parameter("scaling", None)

    def operator(self) -> ConvOperator:
        """The branches squeezed into one operator (Hu et al. 2022, Eq. 3 and 4)."""
        return generate(self)

    def branch_operators(self) -> dict[str, ConvOperator]:
        """Each branch behind its scaling layer, by name: what the plots of Fig. 7 compare."""
        operators = {
            name: branch.operator()  # type: ignore[operator]
            for name, branch in self.branches.items()
        }
        if self.scaling is None:
            return operators
        scaled = zip(operators.items(), self.scaling, strict=True)
        return {name: operator.scale(v) for (name, operator), v in scaled}

    def forward(self, x: Tensor) -> Tensor:
        """The branches on feature maps, scaled and added."""
        outputs = [branch(x) for branch in self.branches.values()]
        if self.scaling is not None:
            shape = (1, -1, *(1,) * len(self.kernel_size))
            outputs = [v.reshape(shape) * y for v, y in zip(self.scaling, outputs, strict=True)]
        return torch.stack(outputs).sum(0)


class LinearBlock(BranchSum):
    """A conv's place in training form: branches, the conv's bias, and a norm if one was inserted.

    It answers the attributes of the conv that it stands for. As a LinearBlock it computes its
    branches on feature maps (linearized, not yet squeezed).
    """

    bias: nn.Parameter | None

    def __init__(self, conv: _ConvNd, block: Block, *, norm: nn.Module | None = None) -> None:
        super().__init__(self.read(conv), block)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.padding = conv.padding
        self.norm = norm
        self.store = KernelStore()
        self.replaces_bias = conv.bias is not None
        # behind a norm a bias has no effect in train mode: the norm's own bias takes it over
        bias = None if conv.bias is None or norm is not None else conv.bias.detach().clone()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.train(conv.training)

    @staticmethod
    def read(conv: _ConvNd) -> ConvOperator:
        """The operator of the conv that a block of this class stands for. Raises NotLinear."""
        return conv_operator(conv)

    @property
    def weight(self) -> Tensor:
        """The squeezed kernel, (C_out, C_in / groups, *K): what the conv's weight would be."""
        return self.operator().weight

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.bias is not None:
            y = y + self.bias.reshape(1, -1, *(1,) * len(self.kernel_size))
        return y if self.norm is None else self.norm(y)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, block={self.block_name}, scaling={self.scaling_layer}"
        )


class ReparamConv(LinearBlock):
    """The squeezed form of a block: one conv with the kernel that its branches make."""

    def forward(self, x: Tensor) -> Tensor:
        made = self.store.operator(self)
        y = made.with_bias(sum_biases(made.bias, self.bias))(x)
        return y if self.norm is None else self.norm(y)


class ReparamConv1d(ReparamConv):
    """A squeezed block in the place of an nn.Conv1d."""


class ReparamConv2d(ReparamConv):
    """A squeezed block in the place of an nn.Conv2d."""


class ReparamConv3d(ReparamConv):
    """A squeezed block in the place of an nn.Conv3d."""


REPARAM_CONVS: dict[int, type[ReparamConv]] = {1: ReparamConv1d, 2: ReparamConv2d, 3: ReparamConv3d}


class DeepStem(SequenceBranch):
    """Stacked k x k as 3 x 3 - 3 x 3 - ...: the linear deep stem (Hu et al. 2022, Sec. 3.5).

    (K - 1) / 2 layers, each an OREPA 3 x 3 kernel with C_out channels. All the padding is on the
    first and the stride on the last, so that their composition is exactly one K x K conv.
    """

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        depth = (conv.kernel_size[0] - 1) // 2
        self.stack = nn.ModuleList(
            BranchSum(_stem_layer(conv, index, depth), OREPA) for index in range(depth)
        )

    def layers(self) -> tuple[ConvOperator, ...]:
        return tuple(layer.operator() for layer in self.stack)  # type: ignore[operator]


def squeezed(block: LinearBlock) -> ReparamConv:
    """The squeezed form of a block: the same parameters, another forward."""
    cls = REPARAM_CONVS[len(block.kernel_size)]
    squeezed_block = cls.__new__(cls)
    squeezed_block.__dict__.update(block.__dict__)
    return squeezed_block


def _stem_layer(conv: ConvOperator, index: int, depth: int) -> ConvOperator:
    width = conv.in_channels if index == 0 else conv.out_channels
    return ConvOperator(
        conv.weight.new_empty(conv.out_channels, width, *(3,) * conv.rank),
        stride=conv.stride if index == depth - 1 else (),
        padding=conv.padding if index == 0 else (),
        dilation=conv.dilation,
        padding_mode=conv.padding_mode,
    )


def spatial_only(maker: BranchMaker) -> BranchMaker:
    """The branch, for convs with more than one tap."""
    return lambda conv: maker(conv) if prod(conv.kernel_size) > 1 else None


def pointwise_only(maker: BranchMaker) -> BranchMaker:
    """The branch, for convs with a single tap."""
    return lambda conv: maker(conv) if prod(conv.kernel_size) == 1 else None


def large_only(maker: BranchMaker) -> BranchMaker:
    """The branch, for large kernels that 3 x 3 convs can be stacked to."""
    return lambda conv: maker(conv) if is_large_stem(conv) else None


def is_large_stem(conv: ConvOperator) -> bool:
    """Whether the conv is dense, reads few channels, and is large, odd and square (or cubic)."""
    sizes = set(conv.kernel_size)
    is_large = len(sizes) == 1 and (k := sizes.pop()) >= LARGE_KERNEL and k % 2 == 1
    return is_large and conv.groups == 1 and conv.in_channels <= STEM_CHANNELS


def inserted_norm(operator: ConvOperator, like: Tensor) -> _BatchNorm:
    """A BatchNorm for the output of a conv: the identity in eval mode at first.

    like: gives dtype and device.
    """
    norm = _NORMS[operator.rank](operator.out_channels, device=like.device, dtype=like.dtype)
    nn.init.constant_(norm.weight, (1 + norm.eps) ** 0.5)
    return norm


# Initial scaling factors: Hu et al. 2022, supplement Sec. 2.1.
OREPA = Block(
    "OREPA",
    {
        "origin": spatial_only(Kernel),
        "pointwise": spatial_only(Pointwise),
        "pointwise_kernel": spatial_only(PointwiseKernel),
        "average": spatial_only(AveragePool),
        "frequency": spatial_only(FrequencyFilter),
        "depthwise_pointwise": spatial_only(DepthwisePointwise),
    },
    {
        "origin": 0.25,
        "pointwise": 1.0,
        "pointwise_kernel": 0.5,
        "average": 0.5,
        "frequency": 0.0,
        "depthwise_pointwise": 0.5,
    },
)

# Two convs 1x1 - 1x1 beside the 1x1 itself: Hu et al. 2022, Sec. 3.5.
OREPA_1X1 = Block(
    "OREPA_1X1",
    {"origin": pointwise_only(Kernel), "pointwise_pointwise": pointwise_only(PointwisePointwise)},
    {"origin": 1.0, "pointwise_pointwise": 0.5},
)

DEEP_STEM = Block("DEEP_STEM", {"deep_stem": large_only(DeepStem)}, {"deep_stem": 1.0})

# The dense branch of the authors' RepVGG block: OREPA without the 1 x 1, which stands beside it and
# has a norm of its own (Hu et al. 2022, supplement Sec. 2.4 and Fig. 5). Their average branch
# starts at 0.25; the paper has 0.5.
OREPA_3X3_REPVGG = Block(
    "OREPA_3X3_REPVGG",
    {name: make for name, make in OREPA.branches.items() if name != "pointwise"},
    {**OREPA.scaling, "average": 0.25},
)

BLOCKS = {block.name: block for block in (OREPA, OREPA_1X1, DEEP_STEM, OREPA_3X3_REPVGG)}


def automatic_block(conv: ConvOperator) -> Block:
    """The block that fits the conv's kernel: 1 x 1, large stem, or k x k."""
    if prod(conv.kernel_size) == 1:
        return OREPA_1X1
    return DEEP_STEM if is_large_stem(conv) else OREPA


@conv_operator.register(LinearBlock)
def _(layer: LinearBlock, in_channels: int | None = None) -> ConvOperator:
    operator = layer.operator()
    operator = operator.with_bias(sum_biases(operator.bias, layer.bias))
    if layer.norm is None:
        return operator
    try:
        return conv_operator(layer.norm) @ operator
    except NotLinear as error:
        raise NotLinear(f"the norm of the block: {error.reason}") from error
