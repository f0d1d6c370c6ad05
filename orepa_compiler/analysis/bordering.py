"""Maps whose border is written side by side: padded, and then set to one value for each channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from orepa_compiler.algebra.geometry import Padding
from orepa_compiler.algebra.operators import identity
from orepa_compiler.algebra.padding import padded_with_bias, padding_operator
from orepa_compiler.analysis.context import Context
from orepa_compiler.analysis.forms import MapForm, at_least, beside_channels
from orepa_compiler.analysis.values import LinearValue, absorbable
from orepa_compiler.capture.constants import as_tensor, with_constants
from orepa_compiler.capture.forwards import with_trial_values
from orepa_compiler.capture.tracing.proxies import write_
from orepa_compiler.errors import NotLinear


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


def bordered(walk: Context, border: WrittenBorder) -> LinearValue | None:
    """Moves padding with the bias of a conv before that conv: pad_b(W x + b) = W pad_0(x) + b.

    Raises NotLinear where the border holds something else.
    """
    before = absorbable(walk.values, border.operand, border.nodes)
    if before is None or before.operator is None:
        return None
    op = before.operator
    if walk.form(border.operand).count != op.rank + 2:
        raise NotLinear("border: the index of its sides means other axes of a map without a batch")
    if not _is_bias(walk, border.border, before):
        raise NotLinear(
            "border: it is padded with something else than the bias of the conv before it"
        )
    like = identity(op.out_channels, op.gives.axes, like=op.weight)
    padded = padded_with_bias(op, padding_operator(like, border.padding, "constant", 0.0))
    nodes = with_constants((*before.nodes, *border.nodes), walk.constants)
    return replace(before, operator=padded, nodes=nodes, layers=before.layers + 1)


def _is_bias(walk: Context, border: fx.Node, before: LinearValue) -> bool:
    """Whether a constant is the bias of a value, for all values of the parameters."""
    other = walk.interpreter.reading(with_trial_values(walk.interpreter.capture))
    op = other.value_of(walk.owner, [node.name for node in before.nodes]).operator
    value = as_tensor(other.constant(walk.owner, border))
    if value is None or op is None or op.bias is None:
        return False
    try:
        shift = beside_channels(value, MapForm(op.gives, at_least(value.dim())))
    except NotLinear:
        return False
    return torch.allclose(shift, op.bias, rtol=1e-12, atol=1e-12)
