"""Lists the keys and shapes of the tensors that each of the authors' blocks stores.

Those of the public implementation of Hu et al. 2022. O, I, G, k: of the conv that a block stands
for; T: the channels inside a 1x1 - kxk branch.
"""

from __future__ import annotations

from torch import nn

from orepa_compiler.branches import DEPTHWISE_MULTIPLIER
from orepa_compiler.reference.parameters import REPVGG_ROWS, ROWS

Shapes = dict[str, tuple[int, ...]]

# Above this number of groups their OREPA doubles T.
_WIDE_GROUPS = 4


def norm_shapes(prefix: str, channels: int) -> Shapes:
    """A BatchNorm."""
    vectors = ("weight", "bias", "running_mean", "running_var")
    shapes: Shapes = {f"{prefix}.{name}": (channels,) for name in vectors}
    return {**shapes, f"{prefix}.num_batches_tracked": ()}


def conv_shape(conv: nn.Conv2d, size: int | None = None) -> tuple[int, ...]:
    """(O, I / G, k, k), with the conv's own k or another."""
    kernel = conv.kernel_size if size is None else (size, size)
    return (conv.out_channels, conv.in_channels // conv.groups, *kernel)


def orepa_shapes(conv: nn.Conv2d) -> Shapes:
    """Their OREPA, without its norm."""
    sizes = (conv.out_channels, conv.in_channels, conv.groups, conv.kernel_size[0])
    return _with_pointwise(_kernel_shapes("weight_orepa_", *sizes, rows=len(ROWS)))


def repvgg_shapes(conv: nn.Conv2d) -> Shapes:
    """The dense branch of their RepVGGBlock_OREPA, without its norm."""
    out, inside = conv.out_channels, conv.in_channels
    # where the block has an identity, their code counts a row for it here, and leaves it unused
    rows = len(REPVGG_ROWS) + (out == inside and conv.stride[0] == 1)
    sizes = (out, inside, conv.groups, conv.kernel_size[0])
    shapes = _kernel_shapes("weight_rbr_", *sizes, rows=rows)
    return {f"rbr_dense.{key}": shape for key, shape in shapes.items()}


def pointwise_shapes(conv: nn.Conv2d) -> Shapes:
    """Their OREPA_1x1, without its norm."""
    out, inside = conv.out_channels, conv.in_channels
    return {
        "weight_or1x1_origin": conv_shape(conv),
        "weight_or1x1_l2i_conv1": (min(out, inside), inside, 1, 1),
        "weight_or1x1_l2i_conv2": (out, min(out, inside), 1, 1),
        "vector": (2, out),
    }


def stem_shapes(conv: nn.Conv2d) -> Shapes:
    """Their OREPA_LargeConv, without its norm: 3 x 3 kernels stacked to a large one."""
    shapes: Shapes = {}
    out = conv.out_channels
    for index in range((conv.kernel_size[0] - 1) // 2):
        inside = out if index else conv.in_channels
        layer = _kernel_shapes("weight_orepa_", out, inside, 1, 3, rows=len(ROWS))
        shapes |= {f"weight{index}.{key}": shape for key, shape in _with_pointwise(layer).items()}
    return shapes


def dbb_shapes(conv: nn.Conv2d, *, first: str) -> Shapes:
    """Their DBB; `first` is the key of its identity-based 1 x 1."""
    out, inside = conv.out_channels, conv.in_channels
    shapes: Shapes = {
        "dbb_origin.conv.weight": conv_shape(conv),
        "dbb_1x1.conv.weight": conv_shape(conv, 1),
        "dbb_avg.conv.weight": conv_shape(conv, 1),
        first: (inside, inside // conv.groups, 1, 1),
        "dbb_1x1_kxk.conv2.weight": (out, inside // conv.groups, *conv.kernel_size),
    }
    for norm in ("dbb_origin.bn", "dbb_1x1.bn", "dbb_avg.bn.bn", "dbb_avg.avgbn"):
        shapes |= norm_shapes(norm, out)
    shapes |= norm_shapes("dbb_1x1_kxk.bn1.bn", inside)
    return shapes | norm_shapes("dbb_1x1_kxk.bn2", out)


def _kernel_shapes(prefix: str, out: int, inside: int, groups: int, k: int, *, rows: int) -> Shapes:
    width, point = inside // groups, (out, inside // groups, 1, 1)
    middle = inside if groups <= _WIDE_GROUPS else 2 * inside
    deep = DEPTHWISE_MULTIPLIER * inside
    return {
        f"{prefix}origin": (out, width, k, k),
        f"{prefix}avg_conv": point,
        f"{prefix}avg_avg": (k, k),
        f"{prefix}pfir_conv": point,
        f"{prefix}prior": (out, k, k),
        f"{prefix}1x1_kxk_idconv1": (middle, width, 1, 1),
        "id_tensor": (middle, width, 1, 1),
        f"{prefix}1x1_kxk_conv2": (out, middle // groups, k, k),
        f"{prefix}gconv_dw": (deep, 1, k, k),
        f"{prefix}gconv_pw": (out, deep // groups, 1, 1),
        "vector": (rows, out),
    }


def _with_pointwise(shapes: Shapes) -> Shapes:
    return {**shapes, "weight_orepa_1x1": shapes["weight_orepa_avg_conv"]}
