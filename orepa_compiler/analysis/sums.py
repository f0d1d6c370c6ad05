"""Sums in a forward: two values of one source side by side."""

from __future__ import annotations

from torch import fx

from orepa_compiler.analysis.context import Context
from orepa_compiler.analysis.elementwise import Arithmetic
from orepa_compiler.analysis.values import LinearValue, absorbable, beside
from orepa_compiler.capture.constants import with_constants
from orepa_compiler.errors import NotLinear


def sum_value(walk: Context, node: fx.Node, addition: Arithmetic) -> LinearValue | None:
    """Joins left + factor right to one value; an operand may be the source itself."""
    options = [
        [v for v in (absorbable(walk.values, x, [node]), LinearValue(x, None)) if v]
        for x in (addition.left, addition.right)
    ]
    if walk.is_in_place(node):  # the sum is written over its first operand
        options[0] = [value for value in options[0] if value.nodes]
    for left in options[0]:
        for right in options[1]:
            if left.source is not right.source or left.operator is right.operator is None:
                continue
            try:
                value = _beside(walk, node, left, right, addition.factor)
            except NotLinear as error:
                walk.keep_apart(node, error.reason)
                continue
            return None if walk.is_overwritten(value, node) else value
    return None if walk.interpreter.at_any_cost else _sum_of_all(walk, node)


def _beside(
    walk: Context, node: fx.Node, left: LinearValue, right: LinearValue, factor: float
) -> LinearValue:
    at_any_cost = walk.interpreter.at_any_cost
    op, macs = beside(left, right, factor, at_any_cost=at_any_cost)
    nodes = with_constants((*left.nodes, *right.nodes, node), walk.constants)
    layers = left.layers + right.layers + 1
    return LinearValue(left.source, op, nodes, macs, layers, left.convs + right.convs)


def _sum_of_all(walk: Context, node: fx.Node) -> LinearValue | None:
    """Joins a sum whose branches would cost more as one conv each, but not all together."""
    value = walk.interpreter.freely.values(walk.owner).get(node)
    if value is None or value.operator is None or value.operator.macs > value.macs:
        return None
    walk.interpreter.reasons.pop((walk.owner, node.name), None)
    return value
