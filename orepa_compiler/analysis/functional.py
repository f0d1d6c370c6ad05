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

from orepa_compiler.algebra.geometry import Padding
from orepa_compiler.algebra.layers import conv_operator, norm_operator, per_axis
from orepa_compiler.algebra.maps import second
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.algebra.overriding import has_torch_forward
from orepa_compiler.algebra.padding import padding_operator
from orepa_compiler.analysis.elementwise import PRODUCT, QUOTIENT, arithmetic
from orepa_compiler.analysis.forms import MapForm, beside_channels, check_type, identity_of
from orepa_compiler.capture.constants import as_tensor
from orepa_compiler.capture.tracing.forward import trace
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
    """A node that reads one map.

    value: gives a constant argument as it is computed in float64; of_model: as the model has it,
    without values. form: tells what is known of the operand. device: where operators are made.
    """

    node: fx.Node
    operand: fx.Node
    value: Callable[[Any], Any]
    of_model: Callable[[Any], Any]
    form: Callable[[], MapForm]
    device: Callable[[], torch.device]

    def identity(self) -> ConvOperator:
        """The operator that does nothing to the operand. Raises NotLinear where nothing tells."""
        return identity_of(self.form(), self.device())

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
        width = call.identity().in_channels
        return conv_operator(pool, width).to(torch.float64, call.device()), 0, 1
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
    stride, dilation = (per_axis(given.get(name, 1), rank) for name in ("stride", "dilation"))
    padding = given.get("padding", 0)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads: Padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in per_axis(0 if padding == "valid" else padding, rank))
    return ConvOperator(weight, bias, stride, pads, dilation, given.get("groups", 1))


def _layers(node: fx.Node) -> int:
    """Counts the layers: 1 for a kernel that is a parameter, 2 for one made at every call."""
    return 1 if _named(node, _CONV)["weight"].op == "get_attr" else 2


def _norm(call: FunctionCall) -> ConvOperator:
    given = call.arguments(_NORM)
    if given.get("training", False) or given.get("input") is not call.operand:
        raise NotLinear("F.batch_norm with training=True takes the statistics of the batch")
    statistics = given["running_mean"], given["running_var"]
    if not all(isinstance(value, Tensor) for value in statistics):
        raise NotLinear("F.batch_norm without running statistics is not affine in eval mode")
    eps = given.get("eps", 1e-5)
    return norm_operator(*statistics, given.get("weight"), given.get("bias"), eps, second())


def _pad(call: FunctionCall) -> ConvOperator:
    given = call.arguments(_PAD)
    pairs = list(zip(given["pad"][::2], given["pad"][1::2], strict=True))[::-1]
    mode, value = given.get("mode", "constant"), given.get("value")
    return padding_operator(call.identity(), tuple(pairs), mode, value or 0.0)


def _crop(call: FunctionCall) -> tuple[ConvOperator, int, int] | None:
    """Reads x[..., 1:-1] as padding by a negative number."""
    if call.node.args[0] is not call.operand:
        return None
    index: Any = call.node.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is Ellipsis or isinstance(part, slice) for part in parts):
        return None
    like = call.identity()
    crops = [_cut(part) for part in _on_last(parts, like.rank, call.form())]
    if None in crops or not crops:
        return None
    pairs = tuple(pair for pair in crops if pair is not None)
    return padding_operator(like, pairs, "constant", 0.0), 0, 1


def _on_last(parts: list[Any], rank: int, form: MapForm) -> list[slice]:
    """The slices of the axes behind the channels; none where others are cut, too.

    Raises NotLinear where the number of axes decides which ones an index from the left cuts.
    """
    whole = slice(None)
    if Ellipsis in parts:
        middle = parts.index(Ellipsis)
        before, after = parts[:middle], parts[middle + 1 :]
    elif form.count is None:
        raise NotLinear(
            "an index that counts axes from the left cuts others of a map without a batch; write "
            "it as [..., 1:-1]"
        )
    else:
        before, after = [], [*parts, *[whole] * (form.count - len(parts))]
    behind = max(len(after) - rank, 0)
    if Ellipsis in after or any(part != whole for part in [*before, *after[:behind]]):
        return []
    return after[behind:]


def _cut(part: slice) -> tuple[int, int] | None:
    start, stop = part.start or 0, part.stop or 0
    is_cut = part.step in (None, 1) and isinstance(start, int) and isinstance(stop, int)
    return (-start, stop) if is_cut and start >= 0 and stop <= 0 and part.stop != 0 else None


def _arithmetic(call: FunctionCall) -> tuple[ConvOperator, int, int] | None:
    """Reads x * gamma, x / gamma, x + beta, x - beta, beta - x; gamma, beta: (C,) or a number."""
    found = arithmetic(call.node)
    if found is None or not (found.left is call.operand or found.right is call.operand):
        return None
    is_left = found.left is call.operand
    other = found.right if is_left else found.left
    number = as_tensor(call.value(other))
    if number is None or (found.kind == QUOTIENT and not is_left):
        return None
    form, stands = call.form(), call.of_model(other)
    check_type(stands, form)
    op = call.identity()
    vector = beside_channels(number, form).to(op.weight)
    if found.kind == PRODUCT:
        return op.scale(vector), 0, 1
    if found.kind == QUOTIENT:
        return op.scale(1 / vector), 0, 1
    if is_left:
        return op.with_bias(found.factor * vector), 0, 1
    return op.scale(torch.full_like(vector, found.factor)).with_bias(vector), 0, 1
