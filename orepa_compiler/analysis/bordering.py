"""Maps whose border is written side by side: padded, and then set to one value for each channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import fx

from orepa_compiler.algebra.operators import Padding
from orepa_compiler.capture.tracing import write_


@dataclass(frozen=True)
class WrittenBorder:
    """pad(operand), whose border then holds `border`, a constant of the forward.

    nodes: the padding and the writes, in order.
    """

    operand: fx.Node
    padding: Padding
    border: fx.Node
    nodes: tuple[fx.Node, ...]


def written_border(node: fx.Node, value: Callable[[Any], Any]) -> WrittenBorder | None:
    """The written border that ends in this node; None for anything else.

    value: gives an argument that is a constant. The border is complete when each side was written
    as a whole, all with one value, and nobody read the map in between.
    """
    nodes = [node]
    while nodes[0].target is write_ and isinstance(nodes[0].args[0], fx.Node):
        nodes.insert(0, nodes[0].args[0])
    if any(list(a.users) != [b] for a, b in pairwise(nodes)):
        return None
    padded, writes = nodes[0], nodes[1:]
    if padded.target is not F.pad or not writes or not isinstance(padded.args[0], fx.Node):
        return None
    pad = value(padded.kwargs["pad"] if "pad" in padded.kwargs else padded.args[1])
    padding = tuple(zip(pad[::2], pad[1::2], strict=True))[::-1]
    sides = {_side(write.args[1], padding) for write in writes}
    wanted = {(axis, side) for axis, pair in enumerate(padding) for side in (0, 1) if pair[side]}
    border = writes[0].args[2]
    is_one = isinstance(border, fx.Node) and all(write.args[2] is border for write in writes)
    if not is_one or sides != wanted or min(map(min, padding)) < 0:
        return None
    assert isinstance(border, fx.Node)
    return WrittenBorder(padded.args[0], padding, border, tuple(nodes))


def _side(index: Any, padding: Padding) -> tuple[int, int] | None:
    """Which side of the border, (axis, 0 or 1), an index selects as a whole."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(part, slice) for part in parts) or len(parts) > 2 + len(padding):
        return None
    cuts = [(axis - 2, part) for axis, part in enumerate(parts) if part != slice(None)]
    if len(cuts) != 1 or cuts[0][0] < 0 or cuts[0][1].step is not None:
        return None
    axis, part = cuts[0]
    before, after = padding[axis]
    if part.start in (0, None) and part.stop == before:
        return (axis, 0)
    return (axis, 1) if part.start == -after and part.stop is None else None
