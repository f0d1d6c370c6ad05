"""Arithmetic between values that is linear: which nodes add and subtract, and which scale.

x + y, x - y and gamma * x stand in forwards as functions or methods of tensors, not as modules.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

SUM, PRODUCT, QUOTIENT = "sum", "product", "quotient"

_SUMS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_DIFFERENCES: set[Any] = {
    operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract", "subtract_",
}  # fmt: skip
_PRODUCTS: set[Any] = {
    operator.mul, operator.imul, torch.mul, torch.multiply,
    "mul", "mul_", "multiply", "multiply_",
}  # fmt: skip
_QUOTIENTS: set[Any] = {
    operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide,
    "div", "div_", "divide", "divide_", "true_divide", "true_divide_",
}  # fmt: skip
_SIGNS = {**dict.fromkeys(_SUMS, 1), **dict.fromkeys(_DIFFERENCES, -1)}
_KINDS = {
    **dict.fromkeys(_SIGNS, SUM),
    **dict.fromkeys(_PRODUCTS, PRODUCT),
    **dict.fromkeys(_QUOTIENTS, QUOTIENT),
}
_OPERANDS = ("input", "other")


@dataclass(frozen=True)
class Arithmetic:
    """left + factor right, left right, or left / right, as a node computes it."""

    kind: str
    left: Any
    right: Any
    factor: float = 1


def arithmetic(node: fx.Node) -> Arithmetic | None:
    """What a node computes of two operands; None for any other node, or another way to call it."""
    if node.op not in ("call_function", "call_method") or node.target not in _KINDS:
        return None
    args, options = list(node.args), dict(node.kwargs)
    args += [options.pop(name) for name in _OPERANDS[len(args) :] if name in options]
    factor: Any = 1
    if node.target in _SIGNS:
        if len(args) == 3:  # torch.add(x, 2, y): x + 2 y, as it was once written
            factor = args.pop(1)
        factor = options.pop("alpha", factor)
    if len(args) != 2 or options or type(factor) not in (int, float):
        return None
    left, right = args
    return Arithmetic(_KINDS[node.target], left, right, factor * _SIGNS.get(node.target, 1))


def addition(node: fx.Node) -> Arithmetic | None:
    """The two values that a node adds, or one of which it subtracts; None for any other node."""
    found = arithmetic(node)
    return found if found and found.kind == SUM else None


def is_add(node: fx.Node) -> bool:
    """Whether the node adds two values, or subtracts one."""
    return addition(node) is not None
