"""Defines blocks: which branches stand in for a conv, and the modules that hold them.

A Block is a value: names, and for each a function from the conv's operator to a branch, or None
where the branch does not apply (`catalogue` has those that are published). In the model a
ConvBlock holds its branches. It is a LinearBlock, on feature maps, or as a ReparamConv, its
squeezed form, one conv; or an OfflineBlock, whose branches normalize and cannot be squeezed
(`offline`).
"""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.kernels import sum_biases
from orepa_compiler.algebra.layers import conv_operator, stated_padding
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks.block import LINEARIZED as LINEARIZED
from orepa_compiler.blocks.block import Block as Block
from orepa_compiler.blocks.block import BranchMaker as BranchMaker
from orepa_compiler.blocks.block import Scaling as Scaling
from orepa_compiler.blocks.leaves import call_of
from orepa_compiler.blocks.plain import conv_with, plain_conv
from orepa_compiler.blocks.stated import WRITTEN, read_only
from orepa_compiler.blocks.sums import BranchesOf, linear_branches
from orepa_compiler.blocks.sums import BranchSum as BranchSum
from orepa_compiler.blocks.sums import SqueezedSum as SqueezedSum
from orepa_compiler.capture.skeleton import is_sharded
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.generation.store import KernelStore

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class ConvBlock(BranchSum):
    """A conv's place in training form: branches, the conv's bias, and a norm if one was inserted.

    It answers the attributes of the conv that it stands for: `weight` and `bias` are those of the
    one conv that it is in eval mode, norms folded in. It computes its branches on feature maps.
    """

    def __init__(
        self, conv: _ConvNd, block: Block, make: BranchesOf, *, norm: nn.Module | None = None
    ) -> None:
        super().__init__(self.read(conv), block, make)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.padding = stated_padding(conv)
        self.norm = norm
        self.store = KernelStore()
        self.replaces_bias = conv.bias is not None
        # behind a norm a bias has no effect in train mode: the norm's own bias takes it over
        bias = None if conv.bias is None or norm is not None else conv.bias.detach().clone()
        self._parameters["bias"] = None if bias is None else nn.Parameter(bias)
        self.train(conv.training)

    @staticmethod
    def read(conv: _ConvNd) -> ConvOperator:
        """The operator of the conv that a block of this class stands for. Raises NotLinear."""
        return conv_operator(conv)

    def as_conv(self) -> ConvOperator:
        """The block as one conv. Raises NotLinear where its norm is not affine."""
        return conv_operator(self)

    def own_bias(self) -> Tensor | None:
        """The parameter that the block adds behind its branches, and before its norm."""
        if "bias" in self._parameters:
            return self._parameters["bias"]
        held: Tensor = vars(self)["bias"]  # a tensor in the parameter's place: pruned, or flattened
        return held

    @property
    def weight(self) -> Tensor:
        """The kernel of that conv, (C_out, C_in / groups, *K), by the norms' running statistics."""
        return read_only(self.as_conv().weight)

    @weight.setter
    def weight(self, value: object) -> None:
        raise ReparamError(WRITTEN.format(name="weight"))

    @property
    def bias(self) -> Tensor | None:
        """The bias of that conv: the block's own where nothing else adds to it."""
        own = self.own_bias()
        if own is not None and is_sharded(own):
            return own  # FSDP asks for its parameter by name, where no kernel can be made
        made = self.as_conv().bias
        return own if made is own or made is None else read_only(made)

    @bias.setter
    def bias(self, value: Tensor) -> None:
        vars(self)["bias"] = value

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers as any module does; refuses what fusers give a conv and no block has place for.

        A bias that is there may be exchanged.
        """
        has_place = name != "weight" and (name != "bias" or self.own_bias() is not None)
        if param is not None and not has_place:
            raise ReparamError(WRITTEN.format(name=name))
        if name == "bias":
            self._parameters["bias"] = param
        else:
            super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:  # named as in a conv, for calls by keyword
        if isinstance(input, fx.Proxy):
            return call_of(self, input)
        y = super().forward(input)
        bias = self.own_bias()
        if bias is not None:
            # of the type that the branches gave: under autocast that is not the parameter's
            y = y + bias.to(y.dtype).reshape(1, -1, *(1,) * len(self.kernel_size))
        return y if self.norm is None else self.norm(y)

    def fuse(self) -> nn.Module:
        """The plain conv that the block stands for: what timm's reparameterize_model asks for.

        In float64, cast once. Raises NotLinear where an inserted norm is not affine.
        """
        return plain_conv(self)

    def plain(self) -> nn.Module:
        """Builds that conv in the block's own precision. Raises NotLinear likewise."""
        return conv_with(conv_operator(self), self)

    def switch_to_deploy(self) -> None:
        """Become that conv, in place: for converters that were written for RepVGG or MobileOne."""
        conv = self.fuse()
        self.__class__ = type(conv)  # type: ignore[assignment]
        self.__dict__ = vars(conv)

    reparameterize = switch_to_deploy

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse, where torch.jit.script asks each module first."""
        raise ReparamError(
            "torch.jit.script cannot read a model in training form; script orepa.collapse(model)"
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, block={self.block_name}, scaling={self.scaling_layer}"
        )


class LinearBlock(ConvBlock):
    """A block whose branches are linear, on feature maps: as linearized, and not yet squeezed."""

    def __init__(self, conv: _ConvNd, block: Block, *, norm: nn.Module | None = None) -> None:
        super().__init__(conv, block, linear_branches, norm=norm)


class ReparamConv(LinearBlock):
    """The squeezed form of a block: one conv with the kernel that its branches make."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return call_of(self, input)
        made = self.store.operator(self)
        y = made.with_bias(sum_biases(made.bias, self.own_bias()))(input)
        return y if self.norm is None else self.norm(y)


class ReparamConv1d(ReparamConv):
    """A squeezed block in the place of an nn.Conv1d."""


class ReparamConv2d(ReparamConv):
    """A squeezed block in the place of an nn.Conv2d."""


class ReparamConv3d(ReparamConv):
    """A squeezed block in the place of an nn.Conv3d."""


REPARAM_CONVS: dict[int, type[ReparamConv]] = {1: ReparamConv1d, 2: ReparamConv2d, 3: ReparamConv3d}


def squeezed(block: LinearBlock) -> ReparamConv:
    """Squeezes a block: the same parameters, and a forward that runs one conv."""
    cls = REPARAM_CONVS[len(block.kernel_size)]
    squeezed_block = cls.__new__(cls)
    squeezed_block.__dict__.update(block.__dict__)
    return squeezed_block


def inserted_norm(operator: ConvOperator, like: Tensor) -> _BatchNorm:
    """Builds a BatchNorm for the output of a conv: the identity in eval mode at first.

    like: gives dtype and device.
    """
    return identity_norm(operator.rank, operator.out_channels, like)


def identity_norm(rank: int, channels: int, like: Tensor) -> _BatchNorm:
    """Builds a BatchNorm of these channels: the identity in eval mode at first."""
    norm = _NORMS[rank](channels, device=like.device, dtype=like.dtype)
    nn.init.constant_(norm.weight, (1 + norm.eps) ** 0.5)
    return norm


@conv_operator.register(ConvBlock)
def _(layer: ConvBlock, in_channels: int | None = None) -> ConvOperator:
    operator = layer.operator()
    operator = operator.with_bias(sum_biases(operator.bias, layer.own_bias()))
    if layer.norm is None:
        return operator
    try:
        return conv_operator(layer.norm) @ operator
    except NotLinear as error:
        raise NotLinear(f"the norm of the block: {error.reason}") from error
