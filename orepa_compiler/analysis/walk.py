"""Walks over a forward once: the value of each node comes from the values of those before it.

A node is a layer, a function that is one, or a sum; what none of these explains has no value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from orepa_compiler.algebra.classifiers import (
    holds_kernel,
    is_batch_norm,
    is_dropout,
    is_idle,
)
from orepa_compiler.algebra.layers import has_handler, linear_part
from orepa_compiler.algebra.maps import SECOND, TOKENS
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.analysis.bordering import bordered, written_border
from orepa_compiler.analysis.context import Interpretation
from orepa_compiler.analysis.elementwise import addition
from orepa_compiler.analysis.forms import MapForm
from orepa_compiler.analysis.functional import FunctionCall, function_operator, operand_of
from orepa_compiler.analysis.sums import sum_value
from orepa_compiler.analysis.values import LinearValue, absorbable, joined
from orepa_compiler.capture import Call
from orepa_compiler.capture.constants import with_constants
from orepa_compiler.errors import NotLinear


@dataclass
class Walk:
    """Goes over the forward of the module at path `owner` for an interpreter.

    values: node -> what it computes, as far as the walk has come.
    """

    interpreter: Interpretation
    owner: str
    values: dict[fx.Node, LinearValue] = field(default_factory=dict)

    def over(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, LinearValue]:
        """The values of some nodes, in their order."""
        for node in nodes:
            value = self.value(node)
            if value is not None:
                self.values[node] = value
        return self.values

    @property
    def constants(self) -> frozenset[fx.Node]:
        """The nodes that hang on no input."""
        return self.interpreter.constants(self.owner)

    def keep_apart(self, node: fx.Node, reason: str) -> None:
        """Says why a node was not joined with what comes before it."""
        self.interpreter.reasons[self.owner, node.name] = reason

    def value(self, node: fx.Node) -> LinearValue | None:
        """What a node computes, if that is linear in one earlier node."""
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if node in self.constants:
            return None
        if node.op == "call_module" and len(operands) == len(node.args) == 1 and not node.kwargs:
            return self._called(node, operands[0])
        if added := addition(node):
            if (
                type(added.left) is int
                and added.left == 0
                and isinstance(added.right, fx.Node)
                and added.factor == 1
            ):
                return self._extended(node, added.right, LinearValue(node, None))  # as in sum()
            maps = {x for x in (added.left, added.right) if isinstance(x, fx.Node)}
            if len(maps) == 2 and self.constants.isdisjoint(maps):
                return sum_value(self, node, added)
        if node.target == "reshape_as":
            return self._flattened_norm(node)
        return self._function(node)

    def _called(self, node: fx.Node, operand: fx.Node) -> LinearValue | None:
        """A module that is called on one map."""
        path = self.interpreter.capture.path_of(Call(self.owner, node))
        if reason := self.interpreter.capture.refusal(path, reader=self.owner):
            self.keep_apart(node, reason)
            return None
        layer = self.layer(path, operand)
        return None if layer is None else self._extended(node, operand, layer)

    def _function(self, node: fx.Node) -> LinearValue | None:
        """A function or method of one map that is a linear layer."""
        operand = operand_of(node, self.constants)
        if operand is None or (self.is_in_place(node) and list(operand.users) != [node]):
            return None
        call = FunctionCall(
            node,
            operand,
            lambda argument: self.interpreter.constant(self.owner, argument),
            lambda argument: self.interpreter.forms.constant(self.owner, argument),
            lambda: self.form(operand),
            lambda: self.interpreter.device,
        )
        try:
            if border := written_border(node, call.value):
                return bordered(self, border)
            found = function_operator(call)
        except NotLinear as error:
            self.keep_apart(node, error.reason)
            return None
        if found is None:
            return None
        op, convs, layers = found
        layer = LinearValue(operand, op.to(torch.float64), (), op.macs, layers, convs)
        return self._extended(node, operand, layer)

    def form(self, node: fx.Node) -> MapForm:
        """What is known of the map that a node gives."""
        value = self.values.get(node)
        known = (
            MapForm() if value is None or value.operator is None else MapForm(value.operator.gives)
        )
        return known.narrowed(self.interpreter.forms.of(self.owner, node))

    def _flattened_norm(self, node: fx.Node) -> LinearValue | None:
        """norm(x.flatten(0, 1)).reshape_as(x): how BatchNorm1d follows a linear layer on tokens."""
        norm, tokens = node.args
        if not isinstance(norm, fx.Node) or norm.op != "call_module":
            return None
        capture = self.interpreter.capture
        flat, path = norm.all_input_nodes[0], capture.path_of(Call(self.owner, norm))
        before = absorbable(self.values, tokens, [flat, node])
        if before is None:
            return None
        shown = flat.target == "flatten" and flat.args == (tokens, 0, 1) and not flat.kwargs
        alone = list(flat.users) == [norm] and list(norm.users) == [node]
        is_norm = is_batch_norm(capture.module(path)) and not capture.refusal(path)
        if not (shown and alone and is_norm and before.operator):
            return None
        layer = self.layer(path, flat)
        if layer is None or layer.operator is None or layer.rest is not None:
            return None
        try:
            flat_norm = replace(layer, operator=layer.operator.with_rank(0))  # of (N, C)
            one = joined(flat_norm, before, node, at_any_cost=self.interpreter.at_any_cost)
        except NotLinear as error:
            self.keep_apart(node, error.reason)
            return None
        return replace(one, nodes=(*before.nodes, flat, norm, node))

    def layer(self, path: str, operand: fx.Node) -> LinearValue | None:
        """What the module at a path is by itself; its source is a stand-in."""
        module = self._module(path)
        if is_idle(module):
            return LinearValue(operand, None)
        if is_dropout(module):
            return None
        if self._is_kept_training(path):
            self.interpreter.reasons[path, ""] = (
                f"{type(module).__name__} stays in train mode when the model is in eval mode, and "
                "takes the statistics of the batch"
            )
            return None
        has_values = any(True for _ in (*module.parameters(), *module.buffers()))
        maps = None if has_values else self.form(operand).maps
        try:
            op, rest = self._operator(path, module, maps.channels if maps else None)
        except NotLinear as error:
            whole = self.interpreter.whole(path)
            if whole and not (getattr(module, "inplace", False) and len(operand.users) > 1):
                return replace(whole, layers=int(whole.operator is not None))  # one, from here
            self.interpreter.reasons[path, ""] = error.reason
            return None
        op = op.to(torch.float64, op.weight.device if has_values else self.interpreter.device)
        convs = int(holds_kernel(module))
        return LinearValue(operand, op, (), op.macs, 1, convs, rest)

    def _operator(
        self, path: str, module: nn.Module, channels: int | None
    ) -> tuple[ConvOperator, nn.Module | None]:
        """linear_part of a module, made once for all that read the same values."""
        known = self.interpreter.operators
        if (path, channels) not in known:
            known[path, channels] = linear_part(module, channels)
        return known[path, channels]

    def _is_kept_training(self, path: str) -> bool:
        """Whether a norm takes the statistics of the batch in eval mode too."""
        if not is_batch_norm(self.interpreter.capture.module(path)):
            return False
        return path in self.interpreter.capture.kept_training

    def _module(self, path: str) -> nn.Module:
        """The module at a path, with its values where it is a layer: those inside are read later.

        Reading a module copies it, and a module of modules would be copied once for each level.
        """
        capture = self.interpreter.capture
        form = capture.module(path)
        is_composite = path in capture.graphs and not has_handler(form)
        return form if is_composite else self.interpreter.read(path)

    def _extended(self, node: fx.Node, operand: fx.Node, layer: LinearValue) -> LinearValue:
        """The layer after what its operand is, or from its operand on where that is not exact."""
        nodes = with_constants([node], self.constants)
        alone = replace(layer, source=operand, nodes=nodes)
        before = absorbable(self.values, operand, nodes)
        if before is None or self.is_overwritten(before, node):
            return alone
        try:
            here = self._of_tokens(layer, before, operand)
            one = joined(here, before, node, at_any_cost=self.interpreter.at_any_cost)
        except NotLinear as error:
            self.keep_apart(node, error.reason)
            return alone
        return replace(one, nodes=with_constants(one.nodes, self.constants))

    def _of_tokens(self, layer: LinearValue, before: LinearValue, operand: fx.Node) -> LinearValue:
        """A norm behind a linear layer, whose last axis is the second where maps have two."""
        ops = layer.operator, before.operator
        if ops[0] is None or ops[1] is None or ops[0].rank or ops[1].gives.axes != TOKENS:
            return layer
        is_norm = ops[0].reads.axes.place == SECOND
        if not is_norm or self.form(operand).count != 2:
            return layer
        return replace(layer, operator=ops[0].with_rank(0))

    def is_in_place(self, node: fx.Node) -> bool:
        """Whether a node writes over its first operand."""
        return self.interpreter.is_in_place(self.owner, node)

    def is_overwritten(self, value: LinearValue, last: fx.Node) -> bool:
        """Whether the source changes from the first node of a value to `last`.

        The one conv would read it where the last node stands, and so after the change. What the
        nodes of the value themselves write over must be seen by nobody else.
        """
        memory, source = self.interpreter.memory, value.source
        inside = {*value.nodes, last}
        node = next(n for n in value.nodes if source in n.all_input_nodes)
        while node is not last.next:
            if memory.overwrites(self.owner, node, source) and not (
                node in inside and memory.is_own(self.owner, source) and set(source.users) <= inside
            ):
                self.keep_apart(last, "its input is overwritten in place before it is done")
                return True
            node = node.next
        return False
