"""Infers the forms of maps from all forwards of a model, before any value is computed.

Each layer tells of what it reads and gives (a conv its width, BatchNorm2d that there is a batch),
and what keeps the form of a map carries that on, in both directions and across modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from orepa_compiler.analysis.form_rules import FormRule, function_rule, layer_rule, sum_form
from orepa_compiler.analysis.forms import NOTHING, MapForm
from orepa_compiler.capture import Call, Capture, join
from orepa_compiler.capture.constants import evaluated
from orepa_compiler.capture.forwards import Forwards
from orepa_compiler.errors import NotLinear

_ROUNDS = 4  # a form that has not come further than this stays unknown


class Forms:
    """The forms of all maps of a capture, found when one is first asked for."""

    def __init__(self, forwards: Forwards) -> None:
        self._forwards = forwards
        self._found: dict[tuple[str, str], MapForm] = {}
        self._layers: dict[tuple[str, str], FormRule | None] = {}
        self._entered: dict[str, bool] = {}
        self._constants: dict[fx.Node, Any] = {}
        self._is_done = self._is_changed = False

    @property
    def _capture(self) -> Capture:
        return self._forwards.capture

    def of(self, owner: str, node: fx.Node) -> MapForm:
        """What is known of the map that a node gives."""
        if not self._is_done:
            self._is_done = True
            self._find()
        return self._found.get((owner, node.name), NOTHING)

    def constant(self, owner: str, argument: Any) -> Any:
        """An argument that is a constant, as the model has it, without values. Raises NotLinear."""

        def attribute(target: str) -> Any:
            holder, _, name = target.rpartition(".")
            return getattr(self._capture.module(join(owner, holder)), name)

        def value(node: fx.Node) -> Any:
            if node not in self._constants:
                self._constants[node] = evaluated(node, attribute)
            return self._constants[node]

        try:
            return fx.node.map_arg(argument, value)
        except Exception as error:  # the user's code, run here: anything may come out of it
            raise NotLinear(f"what it takes cannot be computed ahead ({error})") from error

    @torch.no_grad()
    def _find(self) -> None:
        for _ in range(_ROUNDS):
            self._is_changed = False
            seen: set[str] = set()
            for owner in self._capture.graphs:
                self._go_over(owner, seen)
            if not self._is_changed:
                return

    def _go_over(self, owner: str, seen: set[str]) -> None:
        """Infers through one forward, from first to last node and back, with what it calls."""
        graph = self._forwards.graph(owner)
        if graph is None or owner in seen or owner in self._capture.doubtful:
            return
        seen.add(owner)
        nodes = list(graph.nodes)
        for node in nodes:
            path = self._joined(owner, node)
            if path is not None:
                self._link(owner, node, path)
                self._go_over(path, seen)
            self._look_at(owner, node)
        for node in reversed(nodes):
            self._look_at(owner, node)

    def _look_at(self, owner: str, node: fx.Node) -> None:
        if (path := self._joined(owner, node)) is not None:
            self._link(owner, node, path)
        elif node not in self._forwards.constants(owner):
            for rule in self._rules(owner, node):
                self._keep(owner, node, rule)

    def _rules(self, owner: str, node: fx.Node) -> Iterator[FormRule]:
        if node.op == "call_module":
            path = self._capture.path_of(Call(owner, node))
            if (owner, node.name) not in self._layers:
                self._layers[owner, node.name] = self._layer_rule(path, node)
            if rule := self._layers[owner, node.name]:
                yield rule
        elif node.op != "output" and owner not in self._capture.recorded:
            constants = self._forwards.constants(owner)
            operands = [x for x in node.all_input_nodes if x not in constants]
            if len(operands) == 1:
                forms = self._form(owner, operands[0]), self._form(owner, node)
                yield function_rule(node, operands[0], forms, lambda x: self.constant(owner, x))
            elif len(operands) == 2:
                left, right = (self._form(owner, x) for x in operands)
                self._narrow(owner, node, sum_form(node, left, right))

    def _layer_rule(self, path: str, node: fx.Node) -> FormRule | None:
        is_plain = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
        if not is_plain or self._capture.hook_refusal(path) is not None:
            return None
        return layer_rule(self._capture.module(path), node.all_input_nodes[0])

    def _keep(self, owner: str, node: fx.Node, rule: FormRule) -> None:
        """Writes down what a rule tells of the operand and of what is made of it."""
        self._narrow(owner, rule.operand, rule.before)
        self._narrow(owner, node, rule.after)
        self._narrow(owner, node, rule.kept(self._form(owner, rule.operand), is_forth=True))
        self._narrow(owner, rule.operand, rule.kept(self._form(owner, node), is_forth=False))

    def _joined(self, owner: str, node: fx.Node) -> str | None:
        """The path of a module that this node alone calls, and whose forward is known."""
        if node.op != "call_module" or node.kwargs:
            return None
        path = self._capture.path_of(Call(owner, node))
        if path not in self._entered:
            is_known = self._forwards.graph(path) is not None
            self._entered[path] = is_known and self._capture.refusal(path) is None
        return path if self._entered[path] else None

    def _link(self, owner: str, node: fx.Node, path: str) -> None:
        """The arguments of a call are the inputs of its module, what this returns is its value."""
        graph = self._forwards.graph(path)
        assert graph is not None
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        pairs = list(zip(node.args, inputs, strict=False))
        output = next(iter(reversed(graph.nodes))).args[0]
        for outer, inner in [*pairs, (node, output)]:
            if isinstance(outer, fx.Node) and isinstance(inner, fx.Node):
                self._narrow(path, inner, self._form(owner, outer))
                self._narrow(owner, outer, self._form(path, inner))

    def _form(self, owner: str, node: fx.Node) -> MapForm:
        return self._found.get((owner, node.name), NOTHING)

    def _narrow(self, owner: str, node: fx.Node, form: MapForm) -> None:
        before = self._form(owner, node)
        after = before.narrowed(form)
        if after != before:
            self._found[owner, node.name] = after
            self._is_changed = True
