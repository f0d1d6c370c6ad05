"""Reads tensors of the authors' code as operators: a conv, a norm, a diverse branch block."""

from __future__ import annotations

from functools import partial, reduce
from operator import add

from torch import Tensor, nn

from orepa_compiler.algebra.layers import conv_operator, conv_padding
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.branches import identity_kernel
from orepa_compiler.reference.parameters import Tensors

# The eps of every norm in their networks.
EPS = 1e-5


def norm_of_tensors(tensors: Tensors, prefix: str) -> ConvOperator:
    """What a stored norm computes in eval mode, in float64."""
    start = f"{prefix}."
    own = {k.removeprefix(start): v.double() for k, v in tensors.items() if k.startswith(start)}
    norm = nn.BatchNorm2d(own["weight"].shape[0], eps=EPS, device="meta")
    norm.load_state_dict(own, assign=True)
    return conv_operator(norm)


def spatial(weight: Tensor, conv: nn.Conv2d) -> ConvOperator:
    """A kernel in the place of a conv's own, in float64."""
    stride, padding = tuple(conv.stride), conv_padding(conv)
    return ConvOperator(weight.double(), None, stride, padding, groups=conv.groups)


def dbb_operator(tensors: Tensors, conv: nn.Conv2d, *, first: str) -> ConvOperator:
    """The sum of four branches, each with its norms as in eval mode.

    The norm inside a branch pads its output with what it makes of zeros: the same as padding the
    1 x 1 before it. first: the key of the 1 x 1 that is stored as a difference from the identity.
    """
    weights = {key: value.double() for key, value in tensors.items()}
    origin, delta = weights["dbb_origin.conv.weight"], weights[first]
    size = origin.shape[2:]
    pool = origin.new_full((origin.shape[0], 1, *size), 1 / size.numel())
    norm = partial(norm_of_tensors, tensors)
    outer = partial(ConvOperator, stride=tuple(conv.stride), groups=conv.groups)
    padded = partial(ConvOperator, padding=conv_padding(conv), groups=conv.groups)
    branches = (
        norm("dbb_origin.bn") @ spatial(origin, conv),
        norm("dbb_1x1.bn") @ outer(weights["dbb_1x1.conv.weight"]),
        norm("dbb_1x1_kxk.bn2")
        @ outer(weights["dbb_1x1_kxk.conv2.weight"])
        @ (norm("dbb_1x1_kxk.bn1.bn") @ padded(delta + identity_kernel(delta))),
        norm("dbb_avg.avgbn")
        @ outer(pool, groups=pool.shape[0])
        @ (norm("dbb_avg.bn.bn") @ padded(weights["dbb_avg.conv.weight"])),
    )
    return reduce(add, branches)
