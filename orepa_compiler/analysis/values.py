"""Holds the value of a node in a forward, and says when two of them are joined.

Joined means that one conv does what two did: exactly, and at no more multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn

from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.errors import NotLinear


@dataclass(frozen=True)
class LinearValue:
    """The value of a node: `operator` applied to the value of `source`, then `rest`.

    operator: None stands for the identity, whose width no neighbour has told yet.
    nodes: those that compute it from the source, in order. macs: what they cost for one output
    position of the last. layers: how many of them do something. convs: how many are convs.
    """

    source: fx.Node
    operator: ConvOperator | None
    nodes: tuple[fx.Node, ...] = ()
    macs: int = 0
    layers: int = 0
    convs: int = 0
    rest: nn.Module | None = None


def joined(
    layer: LinearValue, before: LinearValue, node: fx.Node, *, at_any_cost: bool = False
) -> LinearValue:
    """Joins the layer that `node` calls with the value of its operand. Raises NotLinear."""
    op, macs = _after(layer, before, at_any_cost)
    return LinearValue(
        before.source,
        op,
        (*before.nodes, node),
        macs,
        before.layers + layer.layers,
        before.convs + layer.convs,
        layer.rest,
    )


def _after(
    layer: LinearValue, before: LinearValue, at_any_cost: bool
) -> tuple[ConvOperator | None, int]:
    """Composes layer @ before, and counts their cost in the cheaper way: as one conv or apart."""
    if layer.operator is None or before.operator is None:
        known = layer.operator or before.operator
        return known, layer.macs + before.macs
    one = layer.operator @ before.operator
    apart = layer.macs + before.macs * prod(layer.operator.stride)
    return one, _cost(one, apart, at_any_cost)


def beside(
    left: LinearValue, right: LinearValue, factor: float, *, at_any_cost: bool = False
) -> tuple[ConvOperator, int]:
    """Adds left + factor right, and counts its cost in the cheaper way. Raises NotLinear."""
    ops = [
        value.operator or _identity_beside(other.operator)
        for value, other in ((left, right), (right, left))
    ]
    if factor != 1:
        ops[1] = ops[1].scale(torch.full_like(ops[1].weight[:1].flatten()[:1], factor))
    one = ops[0] + ops[1]
    return one, _cost(one, left.macs + right.macs, at_any_cost)


def _identity_beside(other: ConvOperator | None) -> ConvOperator:
    assert other is not None
    return identity(other.in_channels, other.reads.axes, like=other.weight)


def _cost(one: ConvOperator, apart: int, at_any_cost: bool) -> int:
    if one.macs > apart and not at_any_cost:
        raise NotLinear(
            f"as one conv it would cost {one.macs} MACs for each output position, "
            f"apart it costs {apart}; kept apart"
        )
    return min(one.macs, apart)


def absorbable(
    values: Mapping[fx.Node, LinearValue], operand: Any, users: Sequence[fx.Node]
) -> LinearValue | None:
    """Finds the operand's value, which may be joined if nobody but these users needs it."""
    value = values.get(operand) if isinstance(operand, fx.Node) else None
    if value is None or value.rest is not None or not set(operand.users) <= set(users):
        return None
    return value


def maximal(values: dict[fx.Node, LinearValue]) -> list[LinearValue]:
    """The values that are part of no larger one, in the order of the graph."""
    covered: set[fx.Node] = set()
    found = []
    for node, value in reversed(values.items()):
        if node not in covered:
            covered |= set(value.nodes)
            found.append(value)
    return found[::-1]
