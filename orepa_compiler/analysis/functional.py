"""Linear layers that stand in a forward as functions: F.conv2d, F.pad, x * gamma, a crop.

Kernels, norms, scales and shifts are constants of the forward; the one map that a function reads
is its operand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from orepa_compiler.algebra.layers import conv_operator, has_torch_forward, norm_operator
from orepa_compiler.algebra.operators import ConvOperator, Padding, identity
from orepa_compiler.algebra.padding import padding_operator
from orepa_compiler.analysis.elementwise import DIFFERENCES, PRODUCTS, QUOTIENTS, SUMS
from orepa_compiler.capture.constants import as_tensor
from orepa_compiler.capture.tracing import trace
from orepa_compiler.errors import NotLinear

_CONVS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_PAD = ("input", "pad", "mode", "value")
_POOLS = {
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.avg_pool3d: nn.AvgPool3d,
}
_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
         "divisor_override")  # fmt: skip


@dataclass(frozen=True)
class FunctionCall:
    """A node that reads one map. value: gives a constant argument as it is computed in float64.

    identity: gives the operator that does nothing to maps of the operand's width, if it is known.
    """

    node: fx.Node
    operand: fx.Node
    value: Callable[[Any], Any]
    identity: Callable[[], ConvOperator]

    def arguments(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The arguments by name, constants computed; the operand stays a node."""
        given = _named(self.node, names)
        return {n: arg if arg is self.operand else self.value(arg) for n, arg in given.items()}


def _named(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def functional_conv(node: fx.Node) -> str | None:
    """The name of a conv or a linear layer that is called as a function; None for another node."""
    target: Any = node.target
    return str(target.__name__) if target in {*_CONVS, F.linear} else None


def calls_conv(model: nn.Module) -> bool:
    """Whether some forward calls a conv as a function. model: without values."""
    graphs = [trace(module) for module in model.modules() if not has_torch_forward(module)]
    return any(
        node.target in _CONVS for graph in graphs if not isinstance(graph, str)
        for node in graph.nodes
    )  # fmt: skip


def operand_of(node: fx.Node, constants: frozenset[fx.Node]) -> fx.Node | None:
    """The one map that a function or method reads, once; None for what reads another number."""
    if node.op not in ("call_function", "call_method") or node in constants:
        return None
    maps = [x for x in node.all_input_nodes if x not in constants]
    arguments = [*node.args, *node.kwargs.values()]
    return maps[0] if len(maps) == 1 and arguments.count(maps[0]) == 1 else None


def function_operator(call: FunctionCall) -> tuple[ConvOperator, int, int] | None:
    """The operator of a function, how many convs it is, and how many layers; None if it is none.

    Raises NotLinear with the reason where a function like it could be one.
    """
    target: Any = call.node.target
    if functional_conv(call.node):
        op = conv_called(call.node, call.value)
        return (op, 1, _layers(call.node)) if op else None
    if target is F.batch_norm:
        return _norm(call), 0, 1
    if target is F.pad:
        return _pad(call), 0, 1
    if target in _POOLS:
        given = call.arguments(_POOL)
        pool = _POOLS[target](**{name: given[name] for name in _POOL[1:] if name in given})
        like = call.identity()
        return conv_operator(pool, like.in_channels).to(torch.float64, like.weight.device), 0, 1
    if target is operator.getitem:
        return _crop(call)
    return _arithmetic(call)


def conv_called(node: fx.Node, value: Callable[[Any], Any]) -> ConvOperator | None:
    """The operator of F.conv1d, 2d, 3d or F.linear; None where its kernel is made of a map.

    value: gives a constant argument; raises NotLinear where it is none.
    """
    target: Any = node.target
    try:
        given = {n: value(a) for n, a in _named(node, _CONV).items() if n != "input"}
    except NotLinear:
        return None
    weight, bias = given["weight"], given.get("bias")
    if target is F.linear:
        return ConvOperator(weight, bias)
    rank = _CONVS[target]
    stride, dilation = (_per_axis(given.get(name, 1), rank) for name in ("stride", "dilation"))
    padding = given.get("padding", 0)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads: Padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in _per_axis(0 if padding == "valid" else padding, rank))
    return ConvOperator(weight, bias, stride, pads, dilation, given.get("groups", 1))


def _layers(node: fx.Node) -> int:
    """1 for a kernel that is a parameter, 2 for one that is made at every call."""
    return 1 if _named(node, _CONV)["weight"].op == "get_attr" else 2


def _norm(call: FunctionCall) -> ConvOperator:
    given = call.arguments(_NORM)
    if given.get("training", False) or given.get("input") is not call.operand:
        raise NotLinear("F.batch_norm with training=True takes the statistics of the batch")
    statistics = given["running_mean"], given["running_var"]
    if not all(isinstance(value, Tensor) for value in statistics):
        raise NotLinear("F.batch_norm without running statistics is not affine in eval mode")
    eps = given.get("eps", 1e-5)
    return norm_operator(*statistics, given.get("weight"), given.get("bias"), eps, rank=2)


def _pad(call: FunctionCall) -> ConvOperator:
    given = call.arguments(_PAD)
    pairs = list(zip(given["pad"][::2], given["pad"][1::2], strict=True))[::-1]
    mode, value = given.get("mode", "constant"), given.get("value")
    return padding_operator(call.identity(), tuple(pairs), mode, value or 0.0)


def _crop(call: FunctionCall) -> tuple[ConvOperator, int, int] | None:
    """x[:, :, 1:-1]: padding by less than nothing."""
    if call.node.args[0] is not call.operand:
        return None
    index: Any = call.node.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is Ellipsis or isinstance(part, slice) for part in parts):
        return None
    like = call.identity()
    if parts[:1] == [Ellipsis]:
        parts = [slice(None)] * (2 + like.rank - (len(parts) - 1)) + parts[1:]
    if Ellipsis in parts or any(part != slice(None) for part in parts[:2]):
        return None
    crops = [_cut(part) for part in parts[2:]]
    if None in crops or not crops:
        return None
    pairs = [pair for pair in crops if pair] + [(0, 0)] * (like.rank - len(crops))
    return padding_operator(like, tuple(pairs), "constant", 0.0), 0, 1


def _cut(part: slice) -> tuple[int, int] | None:
    start, stop = part.start or 0, part.stop or 0
    is_cut = part.step in (None, 1) and isinstance(start, int) and isinstance(stop, int)
    return (-start, stop) if is_cut and start >= 0 and stop <= 0 and part.stop != 0 else None


def _arithmetic(call: FunctionCall) -> tuple[ConvOperator, int, int] | None:
    """gamma x, x / gamma, x + beta, x - beta, beta - x; with a number or one for each channel."""
    target: Any = call.node.target
    if target not in PRODUCTS | QUOTIENTS | SUMS | DIFFERENCES or call.node.kwargs:
        return None
    if len(call.node.args) != 2:
        return None
    left, right = call.node.args
    number = as_tensor(call.value(left if right is call.operand else right))
    if number is None or (target in QUOTIENTS and left is not call.operand):
        return None
    flat = per_channel(number)
    op = call.identity() if flat is None else _identity_like(*flat)
    vector = flat[0] if flat else _for_every_channel(number, op)
    if vector is None:
        return None
    if target in PRODUCTS:
        return op.scale(vector), 0, 1
    if target in QUOTIENTS:
        return op.scale(1 / vector), 0, 1
    if target in DIFFERENCES and left is call.operand:
        vector = -vector
    if target in DIFFERENCES and right is call.operand:
        op = op.scale(-torch.ones_like(vector))
    return op.with_bias(vector), 0, 1


def per_channel(value: Tensor) -> tuple[Tensor, int] | None:
    """A constant with one number for each channel as (C,), and the rank of the maps it is for.

    It must broadcast over all axes but the channels: (C, 1, 1) or (1, C, 1, 1).
    """
    while value.dim() > 2 and value.shape[0] == 1:
        value = value[0]
    if value.dim() < 2 or value.numel() != value.shape[0] or value.shape[0] == 1:
        return None
    return value.flatten().to(torch.float64), value.dim() - 1


def _identity_like(vector: Tensor, rank: int) -> ConvOperator:
    return identity(vector.shape[0], rank, like=vector)


def _for_every_channel(value: Tensor, like: ConvOperator) -> Tensor | None:
    """One number for all channels, or what scales the last axis, that of a linear layer."""
    if value.numel() == 1 and value.dim() < 2:
        return value.to(like.weight).reshape(1).expand(like.out_channels)
    is_last = like.rank == 0 and value.shape == (like.out_channels,)
    return value.to(like.weight) if is_last else None


def _per_axis(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * rank if len(given) == 1 else given
