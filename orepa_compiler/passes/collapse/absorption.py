"""Folds norms into a conv of any class whose output a kernel scales by output channels.

So are a transposed conv, and a conv that pads by the size of its input, which are no operator of
the algebra: f y + b of its output is the output of the same conv with its kernel and bias scaled.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from orepa_compiler.algebra.classifiers import qualified_name
from orepa_compiler.algebra.overriding import answers_itself, has_torch_forward
from orepa_compiler.capture.constants import reads_form
from orepa_compiler.capture.effects.finding import seen_of
from orepa_compiler.capture.tracing.forward import trace

# Known by where the class is defined; their forward is padding and one F.conv2d.
_PADDING_BY_SIZE = {
    "timm.layers.conv2d_same.Conv2dSame",
    "timm.layers.conv2d_same.Conv2dSameExport",
}
_CONVS: tuple[Any, ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED: tuple[Any, ...] = (
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OF_TRANSPOSED = (*_ARGUMENTS[:5], "output_padding", "groups", "dilation")
# Of a scaled kernel they give what they give of the kernel, scaled.
_CASTS = {"to", "type_as", "float", "double", "half", "bfloat16", "contiguous"}


def absorbs_norm(conv: nn.Module) -> bool:
    """Whether a norm behind this conv can be folded into its kernel and bias."""
    if isinstance(conv, _ConvTransposeNd) and has_torch_forward(conv):
        return True
    if qualified_name(conv) in _PADDING_BY_SIZE:
        return "forward" not in vars(conv)
    return isinstance(conv, _ConvNd) and not answers_itself(conv) and _ends_in_conv(conv)


def _ends_in_conv(conv: _ConvNd) -> bool:
    """Whether a forward of its own gives one conv of something with its kernel and bias.

    y = conv(g(x); W, b), where g and all else of the forward know nothing of W and b; also when it
    gets a bias, which it may not have yet.
    """
    shared = {id(p) for child in conv.children() for p in child.parameters()}
    if not shared.isdisjoint(map(id, conv._parameters.values())):
        return False
    with_bias = copy.copy(conv)
    bias = nn.Parameter(conv.weight.detach().new_empty(conv.out_channels))
    with_bias._parameters = {**conv._parameters, "bias": bias}
    present, future = _around_conv(conv), _around_conv(with_bias)
    return present is not None and present == future


def _around_conv(conv: _ConvNd) -> list[str] | None:
    """What a forward computes, but for the bias of the one conv that it ends in; or None."""
    graph = trace(conv)
    if isinstance(graph, str) or seen_of(graph).does or seen_of(graph).reads:
        return None
    end = _conv_before(next(iter(reversed(graph.nodes))).args[0], conv.weight.dim())
    if end is None or end.target not in (_TRANSPOSED if conv.transposed else _CONVS):
        return None
    names = _OF_TRANSPOSED if conv.transposed else _ARGUMENTS
    given = dict(zip(names, end.args, strict=False)) | dict(end.kwargs)
    if conv.transposed and given.get("groups", 1) != conv.groups:
        return None
    own = ["weight"] if conv.bias is None else ["weight", "bias"]
    if given.get("bias") is not None and conv.bias is None:
        return None
    if not all(_is_used_once(graph, name, given.get(name), end) for name in own):
        return None
    return _without_bias(graph, end)


def _without_bias(graph: fx.Graph, conv: fx.Node) -> list[str]:
    """What a graph computes, in words, its nodes numbered, but for the bias of a conv."""
    gone: set[fx.Node] = set()  # the bias, and what is asked for its sake alone
    for node in reversed(graph.nodes):
        if _is_of_bias(node) or (node.users and gone.issuperset(node.users)):
            gone.add(node)
    nodes = [node for node in graph.nodes if node not in gone]
    numbers = {node: f"%{number}" for number, node in enumerate(nodes)}

    def told(arguments: Any) -> str:
        return str(fx.node.map_arg(arguments, lambda node: numbers.get(node, "bias")))

    names = _OF_TRANSPOSED if conv.target in _TRANSPOSED else _ARGUMENTS
    given = dict(zip(names, conv.args, strict=False)) | dict(conv.kwargs) | {"bias": None}
    return [
        f"{node.op} {node.target} {told(given if node is conv else (node.args, node.kwargs))}"
        for node in nodes
    ]


def _is_of_bias(node: fx.Node) -> bool:
    """Whether a node is the bias, or a cast of it."""
    while node.target in _CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr" and str(node.target) == "bias"


def _conv_before(value: Any, axes: int) -> fx.Node | None:
    """The node whose value a forward returns, but for rows and columns that it cuts away."""
    while isinstance(value, fx.Node) and (
        value.target == "contiguous" or _cuts_positions(value, axes)
    ):
        source = value.all_input_nodes[0]
        if list(source.users) != [value]:
            return None
        value = source
    return value if isinstance(value, fx.Node) else None


def _cuts_positions(node: fx.Node, axes: int) -> bool:
    """Whether an index takes some positions of a map with so many axes, and all of its channels."""
    if getattr(node.target, "__name__", "") != "getitem" or len(node.all_input_nodes) != 1:
        return False
    index = node.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is Ellipsis or isinstance(part, slice) for part in parts):
        return False
    if parts[0] is Ellipsis:
        return len(parts) <= axes - 1 and Ellipsis not in parts[1:]
    return len(parts) > 1 and all(part == slice(None) for part in parts[:2])


def _is_used_once(graph: fx.Graph, name: str, given: Any, conv: fx.Node) -> bool:
    """Whether a conv alone takes a tensor of the forward's own, as what it is."""
    reads = [node for node in graph.nodes if node.op == "get_attr" and str(node.target) == name]
    user = conv
    while isinstance(given, fx.Node) and given.op == "call_method" and given.target in _CASTS:
        if list(given.users) != [user] or len(given.all_input_nodes) > 2:
            return False
        user, given = given, given.args[0]
    uses = [each for each in reads[0].users if not reads_form(each)] if reads else []
    return reads == [given] and uses == [user]


def absorb(conv: nn.Module, factor: Tensor, shift: Tensor) -> nn.Module:
    """The conv followed by y -> factor y + shift, as one conv of its class; both are (C_out,).

    W'_o = f_o W_o,  b'_o = f_o b_o + shift_o
    """
    joined = copy.deepcopy(conv)
    weight, bias = joined.weight, joined.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    factor, shift = (t.to(weight.device, weight.dtype) for t in (factor, shift))
    joined.weight = nn.Parameter(_scaled(joined, weight.detach(), factor), weight.requires_grad)
    scaled = shift if bias is None else shift + factor * bias.detach()
    joined.register_parameter("bias", nn.Parameter(scaled, weight.requires_grad))
    return joined


def _scaled(conv: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """The kernel, scaled by output channel; a transposed one is (C_in, C_out / groups, *K)."""
    ones = (1,) * (weight.dim() - 2)
    if not isinstance(conv, _ConvTransposeNd):
        return weight * factor.reshape(-1, 1, *ones)
    split = weight.reshape(int(conv.groups), -1, *weight.shape[1:])
    return (split * factor.reshape(conv.groups, 1, -1, *ones)).flatten(0, 1)
