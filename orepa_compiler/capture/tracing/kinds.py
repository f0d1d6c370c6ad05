"""Of what type a value in a graph is, as far as the graph tells: what isinstance would answer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from orepa_compiler.algebra.classifiers import is_activation, is_dropout, is_norm

# The operators and methods that give no single tensor: several, or a number.
_OTHERS = {
    "split", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "split_with_sizes",
    "unsafe_chunk", "unsafe_split", "topk", "sort", "max", "min", "median", "mode", "kthvalue",
    "cummax", "cummin", "var_mean", "std_mean", "meshgrid", "broadcast_tensors", "aminmax",
    "item", "tolist", "stride", "is_contiguous", "is_floating_point", "get_device",
    "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "multi_head_attention_forward",
}  # fmt: skip
_COUNTS = {"dim", "ndimension", "numel", "nelement", "ndim"}
_ATTRIBUTES = {
    "shape": torch.Size,
    "dtype": torch.dtype,
    "device": torch.device,
    **dict.fromkeys(_COUNTS, int),
    **dict.fromkeys(("T", "mT", "H", "mH", "data", "real", "imag"), Tensor),
}
_NUMBERS = (bool, int, float)
READ = getattr  # while a forward is traced, the name means another function


def inferred_type(node: fx.Node) -> type | None:
    """The type of a node's value, or None where the graph does not tell.

    meta["kind"] is what the tracer knows of it: of an argument, and of what a module returns.
    """
    if "kind" in node.meta:
        kind: type | None = node.meta["kind"]
        return kind
    if node.op == "get_attr":
        return Tensor
    if node.op == "call_method":
        return _of_method(str(node.target), node)
    if node.op == "call_function":
        return _of_function(node)
    return None


def _of_method(name: str, node: fx.Node) -> type | None:
    if name == "size":
        return torch.Size if len(node.args) + len(node.kwargs) == 1 else int
    if name in _COUNTS:
        return int
    return None if name in _OTHERS else Tensor


def _of_function(node: fx.Node) -> type | None:
    function: Any = node.target
    if function is READ:
        return _ATTRIBUTES.get(str(node.args[1]))
    if function is operator.getitem:
        return _of_item(node)
    if isinstance(function, type):
        return function
    module = getattr(function, "__module__", None) or ""
    if module == "_operator":
        return _of_arithmetic(node)
    if getattr(function, "__name__", "") in _OTHERS:
        return None
    return Tensor if module.split(".")[0] in ("torch", "") else None


def _of_item(node: fx.Node) -> type | None:
    value, index = node.args
    kind = inferred_type(value) if isinstance(value, fx.Node) else None
    if kind is torch.Size:
        return torch.Size if isinstance(index, slice) else int
    return Tensor if kind is Tensor else None


def _of_arithmetic(node: fx.Node) -> type | None:
    kinds = [inferred_type(a) if isinstance(a, fx.Node) else type(a) for a in node.args]
    if Tensor in kinds:
        return Tensor
    if not all(kind in _NUMBERS for kind in kinds):
        return None
    is_float = node.target is operator.truediv or float in kinds
    return float if is_float else int


def kind_of_leaf(module: nn.Module | None, args: Sequence[Any]) -> type | None:
    """The type of what a module without a graph returns."""
    if module is None or isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return tuple
    if isinstance(module, nn.Identity) and args and isinstance(args[0], fx.Proxy):
        return inferred_type(args[0].node)
    is_layer = type(module).__module__.startswith("torch.nn.modules.") and not module._modules
    is_named = is_norm(module) or is_activation(module) or is_dropout(module)
    has_weights = any(True for _ in module.parameters())  # a conv of its own class, a block
    return Tensor if is_layer or is_named or has_weights else None
