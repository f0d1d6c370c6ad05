"""Arithmetic between layers that is linear: sums, differences, and scaling by a parameter.

x + y, x - y and gamma * x stand in forwards as functions or methods of tensors, not as modules.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from orepa_compiler.operators import ConvOperator

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_DIFFERENCES = {operator.sub, operator.isub, torch.sub, "sub", "sub_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
# What may be done to a parameter before it scales a map: its form changes, its values do not.
_RESHAPES = {"view", "reshape", "unsqueeze", "squeeze", operator.getitem, torch.unsqueeze,
             torch.reshape, getattr}  # fmt: skip


def is_add(node: fx.Node) -> bool:
    """Whether the node adds two values, or subtracts one."""
    return _is_one_of(node, _ADDITIONS | _DIFFERENCES)


def is_difference(node: fx.Node) -> bool:
    return _is_one_of(node, _DIFFERENCES)


def scaled_operand(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(the value, the factor) of a product with a parameter of the module; None for another."""
    if not _is_one_of(node, _PRODUCTS) or len(node.args) != 2:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if _is_constant(right) and not _is_constant(left):
        return left, right
    if _is_constant(left) and not _is_constant(right):
        return right, left
    return None


def scaling_operator(node: fx.Node, owner: nn.Module) -> ConvOperator | None:
    """The scaling layer that a constant stands for, one factor per channel; None for another form.

    The constant must broadcast over all axes but the channels: (C, 1, 1) or (1, C, 1, 1).
    """
    factor = _evaluated(node, owner)
    if not isinstance(factor, Tensor):
        return None
    while factor.dim() > 2 and factor.shape[0] == 1:
        factor = factor[0]
    if factor.dim() < 2 or factor.numel() != factor.shape[0] or factor.shape[0] == 1:
        return None
    channels, rank = factor.shape[0], factor.dim() - 1
    return ConvOperator(factor.reshape(channels, 1, *(1,) * rank), groups=channels)


def constant_nodes(node: fx.Node, user: fx.Node) -> list[fx.Node]:
    """The nodes that make a constant, in order, as far as nobody but `user` needs them."""
    if list(node.users) != [user]:
        return []
    return [*(part for arg in node.all_input_nodes for part in constant_nodes(arg, node)), node]


def _is_one_of(node: fx.Node, targets: set[Any]) -> bool:
    return (
        node.op in ("call_function", "call_method") and node.target in targets and not node.kwargs
    )


def _is_constant(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    known = node.op in ("call_function", "call_method") and node.target in _RESHAPES
    return known and bool(node.all_input_nodes) and all(map(_is_constant, node.all_input_nodes))


def _evaluated(node: fx.Node, owner: nn.Module) -> Any:
    if node.op == "get_attr":
        value: Any = owner
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return value
    args = fx.node.map_arg(node.args, lambda arg: _evaluated(arg, owner))
    kwargs = fx.node.map_arg(node.kwargs, lambda arg: _evaluated(arg, owner))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    call: Any = node.target
    return call(*args, **kwargs)
