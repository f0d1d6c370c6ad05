"""Checkpoints as the method authors' public code writes them, and what that code computes.

Written from its documented keys, shapes and formulas, apart from the package: sizes of the
networks, values of the tensors, and the kernels and outputs that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
EPS = 1e-5
BUFFERS = ("id_tensor", "avg_avg", "prior", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Conv:
    """A conv of a network, as it is named there."""

    name: str
    out: int
    inside: int
    k: int
    stride: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Net:
    """A network: its convs, and the width and number of its last features."""

    convs: tuple[Conv, ...]
    features: int
    classes: int
    depths: tuple[int, ...]


def resnet(
    depths: tuple[int, ...],
    *,
    bottleneck: bool = False,
    width: float = 1.0,
    groups: int = 1,
    per_group: int = 64,
    classes: int = 1000,
) -> Net:
    """A ResNet or ResNeXt; `width` multiplies every channel."""
    stem = int(64 * width)
    convs, inside, expansion = [Conv("stage0.conv1", stem, 3, 7, 2)], stem, 4 if bottleneck else 1
    for s, depth in enumerate(depths):
        planes = int(64 * 2**s * width)
        middle = int(64 * 2**s * per_group / 64) * groups if groups > 1 else planes
        middle = int(middle * width) if groups > 1 else middle
        for j in range(depth):
            at, stride, out = f"stage{s + 1}.{j}", 2 if s and not j else 1, planes * expansion
            if stride != 1 or inside != out:
                convs.append(Conv(f"{at}.shortcut", out, inside, 1, stride))
            if bottleneck:
                convs.append(Conv(f"{at}.conv1", middle, inside, 1))
                convs.append(Conv(f"{at}.conv2", middle, middle, 3, stride, groups))
                convs.append(Conv(f"{at}.conv3", out, middle, 1))
            else:
                convs.append(Conv(f"{at}.conv1", planes, inside, 3, stride))
                convs.append(Conv(f"{at}.conv2", out, planes, 3))
            inside = out
    return Net(tuple(convs), inside, classes, depths)


def repvgg(
    widths: tuple[int, ...], depths: tuple[int, ...] = (2, 4, 14, 1), classes: int = 1000
) -> Net:
    """A RepVGG."""
    convs = [Conv("stage0", min(64, widths[0]), 3, 3, 2)]
    for s, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for j in range(depth):
            convs.append(Conv(f"stage{s + 1}.{j}", width, convs[-1].out, 3, 1 if j else 2))
    return Net(tuple(convs), widths[-1], classes, depths)


def values(*shape: int, spread: float = 1.0, low: float = -0.5) -> Tensor:
    """Random values; on the meta device there are only shapes."""
    if torch.get_default_device().type == "meta":
        return torch.empty(*shape, dtype=torch.float64)
    return (torch.rand(*shape, dtype=torch.float64) + low) * spread


def fan_in(*shape: int) -> Tensor:
    size = 1
    for n in shape[1:]:
        size *= n
    return values(*shape, spread=2 * (3 / size) ** 0.5)


def norm(prefix: str, channels: int) -> State:
    own = {
        "weight": values(channels, low=0.5),
        "bias": values(channels),
        "running_mean": values(channels),
        "running_var": values(channels, low=0.5),
        "num_batches_tracked": torch.tensor(7),
    }
    return {f"{prefix}.{name}": value for name, value in own.items()}


def identity(rows: int, width: int) -> Tensor:
    """Row r reads channel r mod width."""
    row = torch.arange(rows).view(-1, 1, 1, 1)
    return (row % width == torch.arange(width).view(1, -1, 1, 1)).double()


def orepa_kernel(conv: Conv, prefix: str = "weight_orepa_") -> State:
    """The tensors of a k x k kernel; the prior is not what its formula gives."""
    o, i, g, k = conv.out, conv.inside, conv.groups, conv.k
    wide = g > 4 and prefix == "weight_orepa_"
    t, rows = (2 * i if wide else i), 6
    own = {
        "origin": fan_in(o, i // g, k, k),
        "avg_conv": fan_in(o, i // g, 1, 1),
        "pfir_conv": fan_in(o, i // g, 1, 1),
        "1x1": fan_in(o, i // g, 1, 1),
        "1x1_kxk_idconv1": values(t, i // g, 1, 1, spread=0.2),
        "1x1_kxk_conv2": fan_in(o, t // g, k, k),
        "gconv_dw": fan_in(8 * i, 1, k, k),
        "gconv_pw": fan_in(o, 8 * i // g, 1, 1),
        "prior": values(o, k, k),
    }
    if prefix == "weight_rbr_":
        del own["1x1"]
        rows = 6 if o == i and conv.stride == 1 else 5
    state = {prefix + name: value for name, value in own.items()}
    with torch.device("cpu"):  # a small one that is looked at, not only measured
        state[f"{prefix}avg_avg"] = torch.full((k, k), 1 / k / k, dtype=torch.float64)
    state["id_tensor"] = (
        identity(t, i // g) if not own["prior"].is_meta else values(t, i // g, 1, 1)
    )
    state["vector"] = values(rows, o, low=0.0)
    return state


def orepa(conv: Conv) -> State:
    if conv.k == 1:
        return orepa_1x1(conv)
    if conv.k == 7:
        return large(conv)
    return {**orepa_kernel(conv), **norm("bn", conv.out)}


def orepa_1x1(conv: Conv) -> State:
    o, i, t = conv.out, conv.inside, min(conv.out, conv.inside)
    return {
        "weight_or1x1_origin": fan_in(o, i, 1, 1),
        "weight_or1x1_l2i_conv1": fan_in(t, i, 1, 1),
        "weight_or1x1_l2i_conv2": fan_in(o, t, 1, 1),
        "vector": values(2, o, low=0.0),
        **norm("bn", o),
    }


def large(conv: Conv) -> State:
    state = norm("bn", conv.out)
    for index in range((conv.k - 1) // 2):
        layer = orepa_kernel(Conv("", conv.out, conv.out if index else conv.inside, 3))
        state |= {f"weight{index}.{key}": value for key, value in layer.items()}
    return state


def conv_bn(conv: Conv) -> State:
    weight = fan_in(conv.out, conv.inside // conv.groups, conv.k, conv.k)
    return {"conv.weight": weight, **norm("bn", conv.out)}


def repvgg_block(conv: Conv, dense: Callable[[Conv], State]) -> State:
    o = conv.out
    state = {f"rbr_dense.{key}": value for key, value in dense(conv).items()}
    state |= {"rbr_1x1.conv.weight": fan_in(o, conv.inside, 1, 1), **norm("rbr_1x1.bn", o)}
    return state | norm("rbr_identity", o) if o == conv.inside and conv.stride == 1 else state


def orepa_vgg(conv: Conv) -> State:
    dense = lambda conv: {**orepa_kernel(conv, "weight_rbr_"), **norm("bn", conv.out)}  # noqa: E731
    return repvgg_block(conv, dense)


def plain_repvgg(conv: Conv) -> State:
    return repvgg_block(conv, conv_bn)


def dbb(conv: Conv, first: str = "idconv1.weight") -> State:
    if conv.k != 3:
        return conv_bn(conv)
    o, i, g = conv.out, conv.inside, conv.groups
    state = {
        "dbb_origin.conv.weight": fan_in(o, i // g, 3, 3),
        "dbb_avg.conv.weight": fan_in(o, i // g, 1, 1),
        "dbb_1x1.conv.weight": fan_in(o, i // g, 1, 1),
        f"dbb_1x1_kxk.{first}": values(i, i // g, 1, 1, spread=0.2),
        "dbb_1x1_kxk.conv2.weight": fan_in(o, i // g, 3, 3),
    }
    for name in ("dbb_origin.bn", "dbb_avg.bn.bn", "dbb_avg.avgbn", "dbb_1x1.bn"):
        state |= norm(name, o)
    return state | norm("dbb_1x1_kxk.bn1.bn", i) | norm("dbb_1x1_kxk.bn2", o)


def deployed(conv: Conv) -> State:
    """-t OREPA after deployment, a shortcut of a basic block being a ConvBN."""
    name = {1: "or1x1_reparam", 3: "orepa_reparam", 7: "or_large_reparam"}[conv.k]
    return deployed_as(name)(conv)


def deployed_as(name: str) -> Callable[[Conv], State]:
    def block(conv: Conv) -> State:
        weight = fan_in(conv.out, conv.inside // conv.groups, conv.k, conv.k)
        return {f"{name}.weight": weight, f"{name}.bias": values(conv.out)}

    return block


def checkpoint(
    net: Net, block: Callable[[Conv], State], shortcut: Callable[[Conv], State] | None = None
) -> State:
    """The state_dict of a network whose convs are all of one block, but for its shortcuts."""
    state: State = {}
    for conv in net.convs:
        make = shortcut if shortcut is not None and conv.name.endswith("shortcut") else block
        state |= {f"{conv.name}.{key}": value for key, value in make(conv).items()}
    state["linear.weight"] = fan_in(net.classes, net.features)
    return {**state, "linear.bias": values(net.classes)}


def count_parameters(state: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for key, value in state.items() if not key.endswith(BUFFERS))


def part(state: Mapping[str, Tensor], name: str) -> State:
    start = f"{name}."
    return {key[len(start) :]: v for key, v in state.items() if key.startswith(start)}


def orepa_weight(own: Mapping[str, Tensor], groups: int, prefix: str = "weight_orepa_") -> Tensor:
    """weight_gen of their OREPA, and with weight_rbr_ of their OREPA_3x3_RepVGG."""
    w = {key[len(prefix) :]: v for key, v in own.items() if key.startswith(prefix)}
    g, scale, k = groups, own["vector"], w["origin"].shape[-1]
    o, ig = w["origin"].shape[:2]
    first = (w["1x1_kxk_idconv1"] + own["id_tensor"])[:, :, 0, 0]
    second = w["1x1_kxk_conv2"]
    composed = torch.einsum(
        "gti,gothw->goihw", first.view(g, -1, ig), second.view(g, o // g, -1, k, k)
    )
    # over (group, channel in the group, 8) and rows over (row in the group, group)
    depthwise = w["gconv_dw"].view(g, ig, 8, k, k)
    pointwise = w["gconv_pw"].view(o // g, g, ig, 8)
    separable = torch.einsum("cithw,ocit->coihw", depthwise, pointwise).reshape(o, ig, k, k)
    kernels = [
        w["origin"],
        torch.einsum("oi,hw->oihw", w["avg_conv"][:, :, 0, 0], w["avg_avg"]),
        torch.einsum("oi,ohw->oihw", w["pfir_conv"][:, :, 0, 0], w["prior"]),
        composed.reshape(o, ig, k, k),
        *([F.pad(w["1x1"], [k // 2] * 4)] if "1x1" in w else []),
        separable,
    ]
    scaled = [torch.einsum("oihw,o->oihw", m, v) for m, v in zip(kernels, scale, strict=False)]
    return torch.stack(scaled).sum(0)


def pointwise_weight(own: Mapping[str, Tensor]) -> Tensor:
    """weight_gen of their OREPA_1x1."""
    origin, vector = own["weight_or1x1_origin"], own["vector"]
    first, second = own["weight_or1x1_l2i_conv1"], own["weight_or1x1_l2i_conv2"]
    composed = torch.einsum("tihw,othw->oihw", first, second)
    return origin * vector[0].view(-1, 1, 1, 1) + composed * vector[1].view(-1, 1, 1, 1)


def stem_weight(own: Mapping[str, Tensor]) -> Tensor:
    """weight_gen of their OREPA_LargeConv: a cross-correlation, no kernel is flipped."""
    depth = len({key.split(".")[0] for key in own if key.startswith("weight")})
    weight = orepa_weight(part(own, "weight0"), 1).transpose(0, 1)
    for index in range(1, depth):
        weight = F.conv2d(weight, orepa_weight(part(own, f"weight{index}"), 1), padding=2)
    return weight.transpose(0, 1)


def weight_of(own: Mapping[str, Tensor], groups: int) -> Tensor:
    """The kernel of a block that ends in one norm."""
    if "weight_orepa_origin" in own:
        return orepa_weight(own, groups)
    if "weight_or1x1_origin" in own:
        return pointwise_weight(own)
    return stem_weight(own) if "weight0.vector" in own else own["conv.weight"]


def normed(x: Tensor, own: Mapping[str, Tensor], name: str, training: bool) -> Tensor:
    weight, bias, mean, var = (
        own[f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")
    )
    if training:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    return F.batch_norm(x, mean, var, weight, bias, eps=EPS)


def block_output(own: State, conv: Conv, x: Tensor, training: bool = False) -> Tensor:
    """What a block computes on feature maps, before its ReLU."""
    at: dict[str, int] = {"stride": conv.stride, "padding": conv.k // 2, "groups": conv.groups}
    for name in {key.split(".")[0] for key in own}:
        if name.endswith("_reparam") or "conv.bias" in own:
            name = name if name.endswith("_reparam") else "conv"
            return F.conv2d(x, own[f"{name}.weight"], own[f"{name}.bias"], **at)
    if "dbb_origin.conv.weight" in own:
        return dbb_output(own, conv, x, training)
    if "rbr_1x1.conv.weight" not in own:
        y = F.conv2d(x, weight_of(own, conv.groups), None, **at)
        return normed(y, own, "bn", training)
    dense = part(own, "rbr_dense")
    kernel = dense.get("conv.weight")
    kernel = orepa_weight(dense, conv.groups, "weight_rbr_") if kernel is None else kernel
    y = normed(F.conv2d(x, kernel, None, **at), own, "rbr_dense.bn", training)
    pointwise = F.conv2d(x, own["rbr_1x1.conv.weight"], None, conv.stride)
    y = y + normed(pointwise, own, "rbr_1x1.bn", training)
    return y + normed(x, own, "rbr_identity", training) if "rbr_identity.weight" in own else y


def dbb_output(own: State, conv: Conv, x: Tensor, training: bool = False) -> Tensor:
    """Their DBB, branch by branch; the norm inside a branch pads with what it makes of zeros."""
    s, g = conv.stride, conv.groups

    def padded(y: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (
            own[f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")
        )
        border = (bias - mean * weight / (var + EPS).sqrt()).view(1, -1, 1, 1)
        inner = F.pad(normed(y, own, name, training), [1] * 4)
        mask = F.pad(torch.ones_like(y), [1] * 4)
        return inner * mask + border * (1 - mask)

    first = next(v for key, v in own.items() if "idconv1" in key)
    first = first + identity(conv.inside, conv.inside // g)
    branches = [
        ("dbb_origin.bn", F.conv2d(x, own["dbb_origin.conv.weight"], None, s, 1, 1, g)),
        ("dbb_1x1.bn", F.conv2d(x, own["dbb_1x1.conv.weight"], None, s, 0, 1, g)),
        (
            "dbb_1x1_kxk.bn2",
            F.conv2d(
                padded(F.conv2d(x, first, groups=g), "dbb_1x1_kxk.bn1.bn"),
                own["dbb_1x1_kxk.conv2.weight"], None, s, 0, 1, g,
            ),
        ),
        (
            "dbb_avg.avgbn",
            F.avg_pool2d(
                padded(F.conv2d(x, own["dbb_avg.conv.weight"], groups=g), "dbb_avg.bn.bn"), 3, s
            ),
        ),
    ]  # fmt: skip
    return torch.stack([normed(y, own, name, training) for name, y in branches]).sum(0)


def output(state: State, net: Net, x: Tensor, training: bool = False) -> Tensor:
    """What their network computes."""
    convs = {conv.name: conv for conv in net.convs}

    def run(name: str, x: Tensor) -> Tensor:
        return block_output(part(state, name), convs[name], x, training)

    is_resnet = "stage0.conv1" in convs
    if is_resnet:
        x = F.max_pool2d(run("stage0.conv1", x).relu(), 3, 2, 1)
    else:
        x = run("stage0", x).relu()
    for s, depth in enumerate(net.depths):
        for at in (f"stage{s + 1}.{j}" for j in range(depth)):
            if not is_resnet:
                x = run(at, x).relu()
                continue
            y, last = x, 3 if f"{at}.conv3" in convs else 2
            for n in range(1, last + 1):
                y = run(f"{at}.conv{n}", y)
                y = y if n == last else y.relu()
            x = (y + (run(f"{at}.shortcut", x) if f"{at}.shortcut" in convs else x)).relu()
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


GEOMETRIES = [
    Conv("", out, inside, 3, stride, groups)
    for (out, inside, groups), stride in product(
        [(6, 6, 1), (6, 4, 1), (4, 6, 2), (16, 8, 4), (16, 16, 8), (12, 6, 6)], [1, 2]
    )
]
