"""Arithmetic between values that is linear: which nodes add and subtract, and which scale.

x + y, x - y and gamma * x stand in forwards as functions or methods of tensors, not as modules.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

SUMS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
DIFFERENCES: set[Any] = {operator.sub, operator.isub, torch.sub, "sub", "sub_"}
PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
QUOTIENTS: set[Any] = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}


def is_add(node: fx.Node) -> bool:
    """Whether the node adds two values, or subtracts one."""
    return _is_one_of(node, SUMS | DIFFERENCES)


def is_difference(node: fx.Node) -> bool:
    return _is_one_of(node, DIFFERENCES)


def _is_one_of(node: fx.Node, targets: set[Any]) -> bool:
    return (
        node.op in ("call_function", "call_method") and node.target in targets and not node.kwargs
    )
