"""Linear regions: parts of a forward that compute one convolution.

A forward is interpreted over the algebra (abstract interpretation of its fx graph): the value of a
node is an operator applied to some earlier node, its source. A region is a maximal set of nodes
with one source and one output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from orepa_compiler.capture import Call, Capture, ancestors
from orepa_compiler.elementwise import (
    constant_nodes,
    is_add,
    is_difference,
    scaled_operand,
    scaling_operator,
)
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.layers import holds_kernel, is_batch_norm, is_dropout, is_idle, linear_part
from orepa_compiler.linear import Linear, absorbable, beside, joined, maximal, mean_other_axes
from orepa_compiler.tracing import IN_PLACE_OPERATORS

# Gives the module at a path, to be read: without values when planning, in float64 when applying.
Read = Callable[[str], nn.Module]

_IN_PLACE = {*IN_PLACE_OPERATORS, "add_", "sub_", "mul_"}


@dataclass(frozen=True)
class Region:
    """A maximal linear region in the forward of the module at path `owner`."""

    owner: str
    value: Linear

    @property
    def is_path(self) -> bool:
        """Whether it is a chain of layers, so that its children can be swapped."""
        return all(node.op == "call_module" for node in self.value.nodes)

    @property
    def node_names(self) -> list[str]:
        return [node.name for node in self.value.nodes]


@dataclass
class Interpreter:
    """Interprets the graphs of a capture, each module once.

    reasons: call node -> why it was not joined with what comes before it.
    """

    capture: Capture
    read: Read
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    _whole: dict[str, Linear | None] = field(default_factory=dict)
    _values: dict[str, dict[fx.Node, Linear]] = field(default_factory=dict)

    def values(self, owner: str) -> dict[fx.Node, Linear]:
        """The linear value of each node of the owner's forward that has one."""
        if owner not in self._values:
            values: dict[fx.Node, Linear] = {}
            for node in self._nodes(owner):
                value = self._value(owner, node, values)
                if value is not None:
                    values[node] = value
            self._values[owner] = values
        return self._values[owner]

    def _nodes(self, owner: str) -> Iterable[fx.Node]:
        """The nodes to interpret. A recording shows chains of layers, and no more than that."""
        nodes = self.capture.graphs[owner].nodes
        if owner in self.capture.doubtful:
            return ()
        is_recorded = owner in self.capture.recorded
        return (node for node in nodes if not is_recorded or node.op == "call_module")

    def value_of(self, owner: str, nodes: Sequence[str], paths: Sequence[str] = ()) -> Linear:
        """The value of a region that a plan found, by the names of its nodes.

        paths: its layers in order, where it is a chain of layers; enough where the forward that
        was recorded for the plan has no graph now.
        """
        if owner in self.capture.untraced and paths:
            return self._chain(paths)
        if owner not in self.capture.graphs:
            reason = self.capture.untraced.get(owner, "no module with a forward of its own is here")
            raise ReparamError(f"the plan does not fit: {reason}", path=owner)
        values: dict[fx.Node, Linear] = {}
        for node in self._nodes(owner):
            if node.name in nodes and (value := self._value(owner, node, values)):
                values[node] = value
        last = next(reversed(values.values()), None)
        if last is None or [node.name for node in last.nodes] != list(nodes):
            raise ReparamError(f"the plan does not fit: no region {', '.join(nodes)}", path=owner)
        return last

    def _chain(self, paths: Sequence[str]) -> Linear:
        node = source = fx.Graph().placeholder("x")
        values: dict[fx.Node, Linear] = {}
        for path in paths:
            layer = self._layer(path, node, values)
            if layer is None:
                raise ReparamError("the plan does not fit: it is not linear", path=path)
            node, before = source.graph.call_module(path, (node,)), values.get(node)
            values[node] = joined(layer, before, node) if before else replace(layer, nodes=(node,))
        return values[node]

    def regions(self, *, sums_only: bool = False) -> list[Region]:
        """All maximal regions with more than one layer, outermost first; none inside another.

        sums_only: only those that are no path, also where one is part of a longer path outside.
        """
        found: list[Region] = []
        consumed: set[str] = set()
        for owner in self.capture.graphs:
            if consumed.intersection([owner, *ancestors(owner)]):
                continue
            for value in maximal(self.values(owner)):
                region = Region(owner, value)
                is_wanted = not (sums_only and region.is_path)
                if is_wanted and value.convs and value.layers > 1:
                    calls = [n for n in value.nodes if n.op == "call_module"]
                    found.append(region)
                    consumed |= {self.capture.path_of(Call(owner, node)) for node in calls}
        return found

    def whole(self, path: str) -> Linear | None:
        """A module's forward as one linear value from its only input to its output, if it is."""
        if path not in self._whole:
            is_recorded = path in self.capture.recorded
            self._whole[path] = None if is_recorded else self._whole_value(path)
        return self._whole[path]

    def _whole_value(self, path: str) -> Linear | None:
        graph = self.capture.graphs[path]
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        output = next(iter(reversed(graph.nodes))).args[0]
        if len(placeholders) != 1 or not isinstance(output, fx.Node):
            return None
        value = self.values(path).get(output)
        whole = value is not None and value.source is placeholders[0] and value.rest is None
        return value if whole else None

    def _value(self, owner: str, node: fx.Node, values: dict[fx.Node, Linear]) -> Linear | None:
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if node.op == "call_module" and len(operands) == len(node.args) == 1 and not node.kwargs:
            return self._call_value(owner, node, operands[0], values)
        if is_add(node):
            if len(operands) == 1 and node.args[0] == 0 and not is_difference(node):  # as in sum()
                return self._extend(owner, node, operands[0], values, Linear(node, None))
            if len(operands) == 2 and operands[0] is not operands[1]:
                return self._sum(owner, node, operands, values)
        if scaled := scaled_operand(node):
            return self._scaled(owner, node, *scaled, values)
        if node.target == "reshape_as":
            return self._flattened_norm(owner, node, values)
        return None

    def _scaled(
        self,
        owner: str,
        node: fx.Node,
        operand: fx.Node,
        factor: fx.Node,
        values: dict[fx.Node, Linear],
    ) -> Linear | None:
        """A value times a parameter with one number per channel: a scaling layer."""
        op = scaling_operator(factor, self.read(owner))
        if op is None or (node.target in _IN_PLACE and list(operand.users) != [node]):
            return None
        before = values.get(operand)
        if before and before.operator and before.operator.rank != op.rank:
            return None
        layer = Linear(operand, op.to(torch.float64), (), op.macs, 0)
        value = self._extend(owner, node, operand, values, layer)
        return replace(value, nodes=(*value.nodes[:-1], *constant_nodes(factor, node), node))

    def _flattened_norm(
        self, owner: str, node: fx.Node, values: dict[fx.Node, Linear]
    ) -> Linear | None:
        """norm(x.flatten(0, 1)).reshape_as(x): how BatchNorm1d follows a linear layer on tokens."""
        norm, tokens = node.args
        if not isinstance(norm, fx.Node) or norm.op != "call_module":
            return None
        flat, path = norm.all_input_nodes[0], self.capture.path_of(Call(owner, norm))
        before = absorbable(values, tokens, [flat, node])
        if before is None:
            return None
        shown = flat.target == "flatten" and flat.args == (tokens, 0, 1) and not flat.kwargs
        alone = list(flat.users) == [norm] and list(norm.users) == [node]
        is_norm = is_batch_norm(self.capture.module(path)) and not self.capture.refusal(path)
        if not (shown and alone and is_norm and before.operator and before.operator.rank == 0):
            return None
        layer = self._layer(path, flat, values)
        if layer is None or layer.rest is not None:
            return None
        return replace(joined(layer, before, node), nodes=(*before.nodes, flat, norm, node))

    def _call_value(
        self, owner: str, node: fx.Node, operand: fx.Node, values: dict[fx.Node, Linear]
    ) -> Linear | None:
        path = self.capture.path_of(Call(owner, node))
        reason = self.capture.refusal(path)
        if reason:
            self.reasons[owner, node.name] = reason
            return None
        layer = self._layer(path, operand, values)
        return None if layer is None else self._extend(owner, node, operand, values, layer)

    def _layer(self, path: str, operand: fx.Node, values: dict[fx.Node, Linear]) -> Linear | None:
        """What the called module is by itself; its source is a stand-in."""
        module = self.read(path)
        if is_idle(module):
            return Linear(operand, None)
        if is_dropout(module):
            return None
        before = values.get(operand)
        width = before.operator.out_channels if before and before.operator else None
        try:
            op, rest = linear_part(module, width)
        except NotLinear as error:
            if path in self.capture.graphs:
                whole = self.whole(path)
                if whole and self._fits(module, whole, operand, before):
                    return replace(whole, layers=int(whole.operator is not None))  # one, from here
            self.reasons[path, ""] = error.reason
            return None
        has_values = any(True for _ in (*module.parameters(), *module.buffers()))
        place = op if has_values or not (before and before.operator) else before.operator
        op = op.to(torch.float64, place.weight.device)
        convs = int(holds_kernel(module))
        return Linear(operand, op, (), op.macs, 1, convs, rest)

    def _fits(
        self, module: nn.Module, whole: Linear, operand: fx.Node, before: Linear | None
    ) -> bool:
        """Whether what a module computes may follow this operand.

        A layer that writes over its input needs it for itself, and a scaling layer that was written
        for maps of one rank means another axis on those of another.
        """
        if getattr(module, "inplace", False) and len(operand.users) > 1:
            return False
        ops = [value.operator for value in (whole, before) if value and value.operator]
        return whole.convs > 0 or len({op.rank for op in ops}) < 2

    def _extend(
        self,
        owner: str,
        node: fx.Node,
        operand: fx.Node,
        values: dict[fx.Node, Linear],
        layer: Linear,
    ) -> Linear:
        """The layer after what its operand is, or from its operand on where that is not exact."""
        alone = replace(layer, source=operand, nodes=(node,))
        before = absorbable(values, operand, [node])
        if before is None:
            return alone
        if self._is_overwritten(owner, before, node):
            return alone
        if mean_other_axes(before.operator, layer.operator):
            self.reasons[owner, node.name] = (
                "a linear layer works on the last axis, a conv or a norm on the second; they may "
                "be joined only behind flatten(0, 1)"
            )
            return alone
        try:
            return joined(layer, before, node)
        except NotLinear as error:
            self.reasons[owner, node.name] = error.reason
            return alone

    def _sum(
        self,
        owner: str,
        node: fx.Node,
        operands: list[fx.Node],
        values: dict[fx.Node, Linear],
    ) -> Linear | None:
        """Two values of one source side by side; an operand may be the source itself."""
        options = [
            [v for v in (absorbable(values, x, [node]), Linear(x, None)) if v] for x in operands
        ]
        if node.target in _IN_PLACE:  # the sum is written over its first operand
            options[0] = [value for value in options[0] if value.nodes]
        for left in options[0]:
            for right in options[1]:
                if left.source is not right.source or left.operator is right.operator is None:
                    continue
                try:
                    op, macs = beside(left, right, is_difference(node))
                except NotLinear as error:
                    self.reasons[owner, node.name] = error.reason
                    continue
                order = {n: i for i, n in enumerate(node.graph.nodes)}
                nodes = sorted({*left.nodes, *right.nodes}, key=order.__getitem__)
                value = Linear(
                    left.source,
                    op,
                    (*nodes, node),
                    macs,
                    left.layers + right.layers + 1,
                    left.convs + right.convs,
                )
                return None if self._is_overwritten(owner, value, node) else value
        return None

    def _is_overwritten(self, owner: str, value: Linear, last: fx.Node) -> bool:
        """Whether the source changes between the first node of a value and `last`.

        The one conv would read it where the last node stands, and so after the change.
        """
        node = value.nodes[0]
        while node is not last:
            reads_it = node.all_input_nodes[:1] == [value.source]
            if reads_it and node not in value.nodes and self._is_in_place(owner, node):
                reason = "its input is overwritten in place before it is done"
                self.reasons[owner, last.name] = reason
                return True
            node = node.next
        return False

    def _is_in_place(self, owner: str, node: fx.Node) -> bool:
        """Whether a node writes over its first operand."""
        if node.op == "call_module":
            module = self.capture.module(self.capture.path_of(Call(owner, node)))
            return bool(getattr(module, "inplace", False))
        name = node.target if isinstance(node.target, str) else node.target.__name__
        is_named = name.endswith("_") and not name.endswith("__")
        return is_named or node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))
