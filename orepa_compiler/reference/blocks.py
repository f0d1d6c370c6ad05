"""Recognizes the authors' blocks, in training and deploy form, and says what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import Block, BranchSum
from orepa_compiler.blocks.catalogue import OREPA, OREPA_1X1, OREPA_3X3_REPVGG
from orepa_compiler.reference.composing import dbb_operator, spatial
from orepa_compiler.reference.parameters import (
    PLAIN_DEEP_STEM,
    Tensors,
    deep_stem_parameters,
    orepa_parameters,
    pointwise_parameters,
    repvgg_parameters,
)
from orepa_compiler.reference.shapes import (
    Shapes,
    conv_shape,
    dbb_shapes,
    norm_shapes,
    orepa_shapes,
    pointwise_shapes,
    repvgg_shapes,
    stem_shapes,
)

ShapesOf = Callable[[nn.Conv2d], Shapes]
Parameters = Callable[[Tensors, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Kind:
    """One of the authors' blocks, in training or deploy form.

    name: as their code calls it. marker: what a key of it begins with. shapes: key -> shape, for a
    conv. operator: what it computes, in float64, from its tensors and the conv that it stands for;
    without a bias if `norm`, which is then the norm behind it. block, parameters: our block with
    the same branches, and its parameters from theirs and the conv's groups. lost: why training
    cannot go on from it, if so.
    """

    name: str
    marker: str
    shapes: ShapesOf
    operator: Callable[[Tensors, nn.Conv2d], ConvOperator]
    norm: str | None = None
    block: Block | None = None
    parameters: Parameters | None = None
    lost: str = ""

    @property
    def has_explicit_branches(self) -> bool:
        """Whether it is a RepVGG block in training form: three branches with norms of their own."""
        return self.marker.startswith("rbr_dense.")


def recognised(keys: Iterable[str]) -> Kind | None:
    """The kind of block that has these keys, or None."""
    found = list(keys)
    for kind in KINDS:
        if any(key.startswith(kind.marker) for key in found):
            return kind
    return None


def _linear_kind(
    name: str,
    marker: str,
    shapes: ShapesOf,
    block: Block,
    parameters: Parameters,
    norm: str = "bn",
) -> Kind:
    """A block of theirs that is linear up to its norm, and our block with its branches."""

    def operator(tensors: Tensors, conv: nn.Conv2d) -> ConvOperator:
        squeezed = BranchSum(conv_operator(conv), block)
        own = {key: value.double() for key, value in parameters(tensors, conv.groups).items()}
        squeezed.load_state_dict(own, assign=True)
        return squeezed.operator()

    def all_shapes(conv: nn.Conv2d) -> Shapes:
        return {**shapes(conv), **norm_shapes(norm, conv.out_channels)}

    return Kind(name, marker, all_shapes, operator, norm, block, parameters)


def _plain_kind(name: str, prefix: str, norm: str) -> Kind:
    """A conv with a norm."""

    def shapes(conv: nn.Conv2d) -> Shapes:
        return {f"{prefix}.weight": conv_shape(conv), **norm_shapes(norm, conv.out_channels)}

    def operator(tensors: Tensors, conv: nn.Conv2d) -> ConvOperator:
        return spatial(tensors[f"{prefix}.weight"], conv)

    return Kind(name, f"{prefix}.", shapes, operator, norm)


def _deployed_kind(prefix: str, marker: str) -> Kind:
    """A conv with a bias: what each of their blocks becomes at deployment."""

    def shapes(conv: nn.Conv2d) -> Shapes:
        return {f"{prefix}.weight": conv_shape(conv), f"{prefix}.bias": (conv.out_channels,)}

    def operator(tensors: Tensors, conv: nn.Conv2d) -> ConvOperator:
        bias = tensors[f"{prefix}.bias"].double()
        return spatial(tensors[f"{prefix}.weight"], conv).with_bias(bias)

    lost = "in deploy form its branches are gone"
    return Kind(prefix, marker, shapes, operator, lost=lost)


def _dbb_kind(marker: str, first: str) -> Kind:
    """Four branches with norms of their own; `first` is the key of the identity-based 1 x 1."""
    lost = "each of its branches ends in a norm, and those of our blocks do not"
    shapes, operator = partial(dbb_shapes, first=first), partial(dbb_operator, first=first)
    return Kind("DBB", marker, shapes, operator, lost=lost)


# In the order in which they are tried: "dbb_reparam." begins with "dbb_", "conv.bias" with "conv.".
KINDS = (
    _deployed_kind("orepa_reparam", "orepa_reparam."),
    _deployed_kind("or1x1_reparam", "or1x1_reparam."),
    _deployed_kind("or_large_reparam", "or_large_reparam."),
    _deployed_kind("dbb_reparam", "dbb_reparam."),
    _deployed_kind("rbr_reparam", "rbr_reparam."),
    _deployed_kind("conv", "conv.bias"),
    _plain_kind("ConvBN", "conv", "bn"),
    _linear_kind("OREPA", "weight_orepa_", orepa_shapes, OREPA, orepa_parameters),
    _linear_kind("OREPA_1x1", "weight_or1x1_", pointwise_shapes, OREPA_1X1, pointwise_parameters),
    _linear_kind("OREPA_LargeConv", "weight0.", stem_shapes, PLAIN_DEEP_STEM, deep_stem_parameters),
    _linear_kind(
        "RepVGGBlock_OREPA",
        "rbr_dense.weight_rbr_",
        repvgg_shapes,
        OREPA_3X3_REPVGG,
        repvgg_parameters,
        "rbr_dense.bn",
    ),
    _plain_kind("RepVGGBlock", "rbr_dense.conv", "rbr_dense.bn"),
    _dbb_kind("dbb_1x1_kxk.idconv1.conv.", "dbb_1x1_kxk.idconv1.conv.weight"),
    _dbb_kind("dbb_", "dbb_1x1_kxk.idconv1.weight"),
)
