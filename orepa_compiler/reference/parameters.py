"""Turns tensors of the authors' blocks into the parameters of ours, one for one.

Every tensor keeps its meaning, so training can go on from it. Four are written differently: the
rows of a grouped pointwise kernel, the layers of the deep stem behind the first, the prior's shape,
and the identity beside the 1 x 1 - k x k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from orepa_compiler.blocks.catalogue import DEEP_STEM, OREPA
from orepa_compiler.branches import identity_kernel

Tensors = Mapping[str, Tensor]

# The rows of `vector`, their scaling layers, in the authors' order.
ROWS = (
    "origin",
    "average",
    "frequency",
    "pointwise_kernel",
    "pointwise",
    "depthwise_pointwise",
)
REPVGG_ROWS = tuple(row for row in ROWS if row != "pointwise")

# Their deep stem ends without a scaling layer of its own.
PLAIN_DEEP_STEM = replace(DEEP_STEM, scaling_layer="none")

# Their tensors, behind weight_orepa_ or weight_rbr_, and the parameters of our branches.
_PARAMETERS = {
    "origin": "origin.weight",
    "1x1": "pointwise.weight",
    "1x1_kxk_idconv1": "pointwise_kernel.pointwise",
    "1x1_kxk_conv2": "pointwise_kernel.kernel",
    "avg_conv": "average.weight",
    "pfir_conv": "frequency.weight",
    "prior": "frequency.prior",
    "gconv_dw": "depthwise_pointwise.depthwise",
    "gconv_pw": "depthwise_pointwise.pointwise",
}


def orepa_parameters(tensors: Tensors, groups: int) -> dict[str, Tensor]:
    """The parameters of our OREPA block from those of their OREPA."""
    return _kernel_parameters(tensors, groups, "weight_orepa_", ROWS)


def repvgg_parameters(tensors: Tensors, groups: int) -> dict[str, Tensor]:
    """The parameters of our OREPA_3X3_REPVGG block from those of their OREPA_3x3_RepVGG.

    The sixth row of their vector, where there is one, is never initialised nor used, nor read here.
    """
    dense = {key.removeprefix("rbr_dense."): value for key, value in tensors.items()}
    return _kernel_parameters(dense, groups, "weight_rbr_", REPVGG_ROWS)


def pointwise_parameters(tensors: Tensors, groups: int) -> dict[str, Tensor]:
    """The parameters of our OREPA_1X1 block from those of their OREPA_1x1.

    Here their identity is the value of a parameter, as it is in ours, and no buffer is added to it.
    """
    return {
        "scaling": tensors["vector"],
        "branches.origin.weight": tensors["weight_or1x1_origin"],
        "branches.pointwise_pointwise.first": tensors["weight_or1x1_l2i_conv1"],
        "branches.pointwise_pointwise.second": tensors["weight_or1x1_l2i_conv2"],
    }


def deep_stem_parameters(tensors: Tensors, groups: int) -> dict[str, Tensor]:
    """The parameters of our deep stem from those of their OREPA_LargeConv.

    They compose the kernels by cross-correlation, without flipping one of the two (Hu et al. 2022,
    supplement Eq. 2, has the flip). Flipping each layer behind the first undoes that:
    correlate(W_1, W_2) = W_1 * flip(W_2).
    """
    parameters = {}
    depth = sum(key.endswith(".vector") for key in tensors)
    for index in range(depth):
        prefix = f"weight{index}."
        layer = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for name, value in orepa_parameters(layer, groups).items():
            turned = value.flip(2, 3) if index and value.dim() == 4 else value
            parameters[f"branches.deep_stem.stack.{index}.{name}"] = turned
    return parameters


def _kernel_parameters(
    tensors: Tensors, groups: int, prefix: str, rows: tuple[str, ...]
) -> dict[str, Tensor]:
    parameters = {
        f"branches.{ours}": tensors[prefix + theirs]
        for theirs, ours in _PARAMETERS.items()
        if prefix + theirs in tensors
    }
    # exact where the buffer is the identity, as it should be: the difference is zero
    delta, fixed = tensors[f"{prefix}1x1_kxk_idconv1"], tensors["id_tensor"]
    delta = delta + (fixed - identity_kernel(fixed)).to(delta)
    parameters["branches.pointwise_kernel.pointwise"] = delta
    # the buffer as it was stored: what its formula gives may differ from what was trained with
    parameters["branches.frequency.prior"] = tensors[f"{prefix}prior"].unsqueeze(1)
    pointwise = tensors[f"{prefix}gconv_pw"]
    parameters["branches.depthwise_pointwise.pointwise"] = _natural_rows(pointwise, groups)
    order = [rows.index(name) for name in OREPA.branches if name in rows]
    parameters["scaling"] = torch.stack([tensors["vector"][row] for row in order])
    return parameters


def _natural_rows(pointwise: Tensor, groups: int) -> Tensor:
    """A grouped pointwise kernel with its output rows group by group.

    Their rows run over (row in the group, group), ours over (group, row in the group).
    """
    split = pointwise.unflatten(0, (pointwise.shape[0] // groups, groups))
    return split.transpose(0, 1).flatten(0, 1)
