"""Linear regions: parts of a forward that compute one convolution.

A forward is interpreted over the algebra (abstract interpretation of its fx graph): the value of a
node is an operator applied to some earlier node, its source. A region is a maximal set of nodes
with one source and one output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from orepa_compiler.algebra.layers import (
    has_handler,
    holds_kernel,
    is_batch_norm,
    is_dropout,
    is_idle,
    linear_part,
)
from orepa_compiler.algebra.operators import identity
from orepa_compiler.algebra.padding import padded_with_bias, padding_operator
from orepa_compiler.analysis.bordering import WrittenBorder, written_border
from orepa_compiler.analysis.elementwise import is_add, is_difference
from orepa_compiler.analysis.functional import (
    FunctionCall,
    function_operator,
    operand_of,
    per_channel,
)
from orepa_compiler.analysis.linear import (
    Linear,
    absorbable,
    beside,
    joined,
    maximal,
    mean_other_axes,
)
from orepa_compiler.analysis.widths import identity_before
from orepa_compiler.capture import Call, ancestors
from orepa_compiler.capture.constants import as_tensor, with_constants
from orepa_compiler.capture.forwards import Forwards, tried
from orepa_compiler.errors import NotLinear, ReparamError


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
class Interpreter(Forwards):
    """Interprets the graphs of a capture, each module once.

    at_any_cost: joins also where one conv costs more than two. reasons: call node -> why it was
    not joined with what comes before it.
    """

    at_any_cost: bool = False
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    _whole: dict[str, Linear | None] = field(default_factory=dict)
    _values: dict[str, dict[fx.Node, Linear]] = field(default_factory=dict)
    _open: set[str] = field(default_factory=set)
    _freely: Interpreter | None = None

    def values(self, owner: str) -> dict[fx.Node, Linear]:
        """The linear value of each node of the owner's forward that has one."""
        if owner not in self._values:
            values: dict[fx.Node, Linear] = {}
            self._open.add(owner)
            for node in self._nodes(owner):
                value = self._value(owner, node, values)
                if value is not None:
                    values[node] = value
            self._open.remove(owner)
            self._values[owner] = values
        return self._values[owner]

    def _nodes(self, owner: str) -> Iterable[fx.Node]:
        """The nodes to interpret. A recording shows chains of layers, and no more than that."""
        graph = self.graph(owner)
        if graph is None or owner in self.capture.doubtful:
            return ()
        is_recorded = owner in self.capture.recorded
        return (node for node in graph.nodes if not is_recorded or node.op == "call_module")

    def is_open(self, owner: str) -> bool:
        """Whether the owner's forward is being interpreted right now."""
        return owner in self._open

    def value_of(self, owner: str, nodes: Sequence[str], paths: Sequence[str] = ()) -> Linear:
        """The value of a region that a plan found, by the names of its nodes.

        paths: its layers in order, where it is a chain of layers; enough where the forward that
        was recorded for the plan has no graph now.
        """
        if owner in self.capture.untraced and paths:
            return self._chain(paths)
        if self.graph(owner) is None:
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
            one = joined(layer, before, node, at_any_cost=True) if before else None
            values[node] = one or replace(layer, nodes=(node,))
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
                if reason := self.remaining_reads(owner, value.nodes):
                    self.reasons[owner, value.nodes[-1].name] = reason
                    continue
                region = Region(owner, value)
                is_wanted = not (sums_only and region.is_path)
                if is_wanted and value.convs and value.layers > 1:
                    calls = [n for n in value.nodes if n.op == "call_module"]
                    found.append(region)
                    consumed |= {self.capture.path_of(Call(owner, node)) for node in calls}
        return found

    def whole(self, path: str) -> Linear | None:
        """A module's forward as one linear value from its first input to its output, if it is."""
        if path not in self._whole:
            is_recorded = path in self.capture.recorded
            self._whole[path] = None if is_recorded else self._whole_value(path)
        return self._whole[path]

    def _whole_value(self, path: str) -> Linear | None:
        graph = self.graph(path)
        if graph is None:
            return None
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        output = next(iter(reversed(graph.nodes))).args[0]
        if any(node.users for node in placeholders[1:]) or not isinstance(output, fx.Node):
            return None
        value = self.values(path).get(output)
        whole = value is not None and value.source in placeholders[:1] and value.rest is None
        return value if whole else None

    def _value(self, owner: str, node: fx.Node, values: dict[fx.Node, Linear]) -> Linear | None:
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if node in self.constants(owner):
            return None
        if node.op == "call_module" and len(operands) == len(node.args) == 1 and not node.kwargs:
            return self._call_value(owner, node, operands[0], values)
        if is_add(node):
            if len(operands) == 1 and node.args[0] == 0 and not is_difference(node):  # as in sum()
                return self._extend(owner, node, operands[0], values, Linear(node, None))
            are_maps = self.constants(owner).isdisjoint(operands)
            if len(operands) == 2 and operands[0] is not operands[1] and are_maps:
                return self._sum(owner, node, operands, values)
        if node.target == "reshape_as":
            return self._flattened_norm(owner, node, values)
        return self._function(owner, node, values)

    def _function(self, owner: str, node: fx.Node, values: dict[fx.Node, Linear]) -> Linear | None:
        """A function or method of one map that is a linear layer."""
        operand = operand_of(node, self.constants(owner))
        if operand is None or (self.is_in_place(owner, node) and list(operand.users) != [node]):
            return None
        call = FunctionCall(
            node,
            operand,
            lambda argument: self.constant(owner, argument),
            lambda: identity_before(self, operand, values, node),
        )
        try:
            if border := written_border(node, call.value):
                return self._bordered(owner, node, border, values)
            found = function_operator(call)
        except NotLinear as error:
            self.reasons[owner, node.name] = error.reason
            return None
        if found is None:
            return None
        op, convs, layers = found
        layer = Linear(operand, op.to(torch.float64), (), op.macs, layers, convs)
        return self._extend(owner, node, operand, values, layer)

    def _bordered(
        self, owner: str, node: fx.Node, border: WrittenBorder, values: dict[fx.Node, Linear]
    ) -> Linear | None:
        """A map padded with the bias of what gives it: pad_b(W x + b) = W pad_0(x) + b."""
        before = absorbable(values, border.operand, border.nodes)
        if before is None or before.operator is None:
            return None
        op = before.operator
        if not self._is_bias(owner, border.border, before):
            raise NotLinear(
                "border: it is padded with something else than the bias of the conv before it"
            )
        like = identity(op.out_channels, op.rank, like=op.weight)
        padded = padded_with_bias(op, padding_operator(like, border.padding, "constant", 0.0))
        nodes = with_constants((*before.nodes, *border.nodes), self.constants(owner))
        return replace(before, operator=padded, nodes=nodes, layers=before.layers + 1)

    def _is_bias(self, owner: str, border: fx.Node, before: Linear) -> bool:
        """Whether a constant is the bias of a value, for all values of the parameters."""
        other = Interpreter(self.capture, tried(self.capture), at_any_cost=True)
        op = other.value_of(owner, [node.name for node in before.nodes]).operator
        value = as_tensor(other.constant(owner, border))
        flat = None if value is None or op is None else per_channel(value)
        if flat is None or op is None or op.bias is None:
            return False
        return torch.allclose(flat[0], op.bias, rtol=1e-12, atol=1e-12)

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
        one = joined(layer, before, node, at_any_cost=self.at_any_cost)
        return replace(one, nodes=(*before.nodes, flat, norm, node))

    def _call_value(
        self, owner: str, node: fx.Node, operand: fx.Node, values: dict[fx.Node, Linear]
    ) -> Linear | None:
        path = self.capture.path_of(Call(owner, node))
        reason = self.capture.refusal(path, reader=owner)
        if reason:
            self.reasons[owner, node.name] = reason
            return None
        layer = self._layer(path, operand, values)
        return None if layer is None else self._extend(owner, node, operand, values, layer)

    def _layer(self, path: str, operand: fx.Node, values: dict[fx.Node, Linear]) -> Linear | None:
        """What the called module is by itself; its source is a stand-in."""
        module = self._layer_at(path)
        if is_idle(module):
            return Linear(operand, None)
        if is_dropout(module):
            return None
        before = values.get(operand)
        has_values = any(True for _ in (*module.parameters(), *module.buffers()))
        try:
            like = None if has_values else identity_before(self, operand, values, path)
        except NotLinear:
            like = None
        try:
            op, rest = linear_part(module, like.in_channels if like else None)
        except NotLinear as error:
            whole = self.whole(path)
            if whole and self._fits(module, whole, operand, before):
                return replace(whole, layers=int(whole.operator is not None))  # one, from here
            self.reasons[path, ""] = error.reason
            return None
        op = op.to(torch.float64, (like or op).weight.device)
        convs = int(holds_kernel(module))
        return Linear(operand, op, (), op.macs, 1, convs, rest)

    def _layer_at(self, path: str) -> nn.Module:
        """The module at a path, with its values where it is a layer: those inside are read later.

        Reading a module copies it, and a module of modules would be copied once for each level.
        """
        form = self.capture.module(path)
        is_composite = path in self.capture.graphs and not has_handler(form)
        return form if is_composite else self.read(path)

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
        nodes = with_constants([node], self.constants(owner))
        alone = replace(layer, source=operand, nodes=nodes)
        before = absorbable(values, operand, nodes)
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
            one = joined(layer, before, node, at_any_cost=self.at_any_cost)
            return replace(one, nodes=with_constants(one.nodes, self.constants(owner)))
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
        if self.is_in_place(owner, node):  # the sum is written over its first operand
            options[0] = [value for value in options[0] if value.nodes]
        for left in options[0]:
            for right in options[1]:
                if left.source is not right.source or left.operator is right.operator is None:
                    continue
                try:
                    cost = self.at_any_cost
                    op, macs = beside(left, right, is_difference(node), at_any_cost=cost)
                except NotLinear as error:
                    self.reasons[owner, node.name] = error.reason
                    continue
                nodes = (*left.nodes, *right.nodes, node)
                value = Linear(
                    left.source,
                    op,
                    with_constants(nodes, self.constants(owner)),
                    macs,
                    left.layers + right.layers + 1,
                    left.convs + right.convs,
                )
                return None if self._is_overwritten(owner, value, node) else value
        return None if self.at_any_cost else self._sum_of_all(owner, node)

    def _sum_of_all(self, owner: str, node: fx.Node) -> Linear | None:
        """A sum whose branches would cost more as one conv each, but not all of them together."""
        if self._freely is None:
            self._freely = type(self)(self.capture, self.read, at_any_cost=True)
        value = self._freely.values(owner).get(node)
        if value is None or value.operator is None or value.operator.macs > value.macs:
            return None
        self.reasons.pop((owner, node.name), None)
        return value

    def _is_overwritten(self, owner: str, value: Linear, last: fx.Node) -> bool:
        """Whether the source changes between the first node of a value and `last`.

        The one conv would read it where the last node stands, and so after the change.
        """
        node = next(n for n in value.nodes if value.source in n.all_input_nodes)
        while node is not last:
            reads_it = node.all_input_nodes[:1] == [value.source]
            if reads_it and node not in value.nodes and self.is_in_place(owner, node):
                reason = "its input is overwritten in place before it is done"
                self.reasons[owner, last.name] = reason
                return True
            node = node.next
        return False
