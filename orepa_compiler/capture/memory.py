"""Which values of a forward may share memory, and what a node may write over.

A rewritten layer reads its input where the last node of its region stood. Whatever wrote over that
input before then, in place, through a view or inside another module, would change what it reads.
What is not known to be fresh is taken to be a view, and what is not known to write nothing to write
over all that it is given.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import fx, nn

from orepa_compiler.algebra.classifiers import is_idle, is_norm
from orepa_compiler.algebra.overriding import has_torch_forward
from orepa_compiler.capture import Call
from orepa_compiler.capture.constants import call_writes, writes_over_numbers
from orepa_compiler.capture.effects.finding import written_buffers
from orepa_compiler.capture.graphs import Graphs
from orepa_compiler.capture.tracing.proxies import IN_PLACE_OPERATORS

# Functions and methods whose result is a tensor of its own, by name. By hand: many that return a
# view of their operand, or the operand, do not say so in their schema (einsum, channel_shuffle,
# dropout, atleast_1d). A test looks that no schema says so of one of these.
_FRESH = {
    "add", "sub", "rsub", "mul", "div", "truediv", "floordiv", "neg", "pow", "matmul", "bmm",
    "cat", "concat", "stack", "clone", "mean", "sum", "exp", "log", "sqrt", "rsqrt",
    "abs", "relu", "relu6", "gelu", "silu", "elu", "leaky_relu", "hardswish", "hardsigmoid",
    "hardtanh", "mish", "softplus", "sigmoid", "tanh", "softmax", "log_softmax", "conv1d", "conv2d",
    "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "batch_norm",
    "layer_norm", "group_norm", "instance_norm", "normalize", "max_pool1d", "max_pool2d",
    "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "pad", "interpolate", "scaled_dot_product_attention",
}  # fmt: skip
_VIEWING_LAYERS = (nn.Flatten, nn.Unflatten, nn.Sequential)  # an empty one gives its input back
_TORCH = {"torch", "_operator", "builtins", "math"}  # their functions write only if they say so


@dataclass
class Memory:
    """Looks at the forwards of a capture, each once.

    _written, _returned: module path -> its inputs, by number, that it may write over, or return a
    view of; None where no graph tells.
    """

    graphs: Graphs
    _written: dict[str, frozenset[int] | None] = field(default_factory=dict)
    _returned: dict[str, frozenset[int] | None] = field(default_factory=dict)

    def overwrites(self, owner: str, node: fx.Node, value: fx.Node) -> bool:
        """Whether a node of the owner's forward may write over what another one gives."""
        return any(self._share(owner, target, value) for target in self.targets(owner, node))

    def is_own(self, owner: str, value: fx.Node) -> bool:
        """Whether a value shares memory with no other: neither an input, nor a view."""
        return self._roots(owner, value) == {value} and value.op != "placeholder"

    def written_attributes(self, owner: str) -> set[str]:
        """The tensors of a module that its forward writes over: counters, moving averages."""
        graph = self.graphs.graph(owner)
        nodes = _nodes(graph)
        if not any(node.op == "get_attr" for node in nodes):
            return set()
        kept = [node for node in nodes if not writes_over_numbers(node)]
        targets = [target for node in kept for target in self.targets(owner, node)]
        roots = {root for target in targets for root in self._roots(owner, target)}
        return {str(r.target) for r in roots if r.op == "get_attr"} | written_buffers(graph)

    def targets(self, owner: str, node: fx.Node) -> list[fx.Node]:
        """The operands that a node may write over."""
        if node.op == "call_module":
            return self._targets_of_module(owner, node)
        if node.op not in ("call_function", "call_method"):
            return []
        found = [arg for arg in [node.kwargs.get("out")] if isinstance(arg, fx.Node)]
        if is_in_place(node):
            return [*node.all_input_nodes[:1], *found]
        home = str(getattr(node.target, "__module__", None) or "torch")
        is_known = node.op == "call_method" or home.partition(".")[0] in _TORCH
        return found if is_known else node.all_input_nodes

    def _targets_of_module(self, owner: str, node: fx.Node) -> list[fx.Node]:
        path = self.graphs.capture.path_of(Call(owner, node))
        if self.graphs.capture.hook_refusal(path) is not None:
            return node.all_input_nodes
        if self._is_leaf(path):
            module = self.graphs.capture.module(path)
            return node.all_input_nodes[:1] if getattr(module, "inplace", False) else []
        if path not in self._written:
            graph = self.graphs.graph(path)
            found = [target for each in _nodes(graph) for target in self.targets(path, each)]
            self._written[path] = self._inputs_behind(path, found) if graph else None
        return _given(node, self._written[path])

    def _returned_by_module(self, owner: str, node: fx.Node) -> list[fx.Node]:
        """The operands that what a module returns may be, or be a view of."""
        path = self.graphs.capture.path_of(Call(owner, node))
        if self._is_leaf(path):
            module = self.graphs.capture.module(path)
            is_view = is_idle(module) or isinstance(module, _VIEWING_LAYERS)
            return node.all_input_nodes if is_view or getattr(module, "inplace", False) else []
        if path not in self._returned:
            graph = self.graphs.graph(path)
            found = [value for each in _nodes(graph)[-1:] for value in each.all_input_nodes]
            self._returned[path] = self._inputs_behind(path, found) if graph else None
        return _given(node, self._returned[path])

    def _is_leaf(self, path: str) -> bool:
        """Whether a module is read as a whole: a layer of torch's, a norm, a block."""
        capture = self.graphs.capture
        if path in capture.graphs or path in capture.untraced:
            return False
        module = capture.module(path)
        return has_torch_forward(module) or is_norm(module) or bool(module._modules)

    def _inputs_behind(self, path: str, nodes: list[fx.Node]) -> frozenset[int]:
        """The inputs of a module that some values in it may share memory with."""
        roots = {root for node in nodes for root in self._roots(path, node)}
        inputs = [n for n in nodes[0].graph.nodes if n.op == "placeholder"] if nodes else []
        return frozenset(index for index, node in enumerate(inputs) if node in roots)

    def _share(self, owner: str, left: fx.Node, right: fx.Node) -> bool:
        """Whether two values may share memory. Two inputs may be one tensor."""
        roots = self._roots(owner, left), self._roots(owner, right)
        both_given = all(any(r.op == "placeholder" for r in found) for found in roots)
        return both_given or not roots[0].isdisjoint(roots[1])

    def _roots(self, owner: str, node: fx.Node) -> frozenset[fx.Node]:
        """The values of their own, or inputs, that a value may share memory with."""
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        open_ends = [node]
        while open_ends:
            value = open_ends.pop()
            if value not in seen:
                seen.add(value)
                sources = self._viewed(owner, value)
                open_ends += sources
                if not sources or value.op == "call_module":
                    found.add(value)
        return frozenset(found)

    def _viewed(self, owner: str, node: fx.Node) -> list[fx.Node]:
        """The operands that a node's value may be, or be a view of."""
        if node.op == "call_module":
            return self._returned_by_module(owner, node)
        if node.op not in ("call_function", "call_method"):
            return []
        name = str(getattr(node.target, "__name__", node.target))
        if is_in_place(node):
            return node.all_input_nodes[:1]
        is_fresh = name.strip("_") in _FRESH and "out" not in node.kwargs
        return [] if is_fresh else node.all_input_nodes


def _nodes(graph: fx.Graph | None) -> list[fx.Node]:
    return list(graph.nodes) if graph else []


def _given(call: fx.Node, inputs: frozenset[int] | None) -> list[fx.Node]:
    """What a call gives for some inputs of a module; all that it gives where that is not plain."""
    given = [arg for arg in call.args if isinstance(arg, fx.Node)]
    is_plain = not call.kwargs and len(given) == len(call.args)
    if inputs is None or (inputs and not is_plain):
        return call.all_input_nodes
    return [node for index, node in enumerate(given) if index in inputs]


def is_in_place(node: fx.Node) -> bool:
    """Whether a function or method writes over its first operand: by its name, or if told to."""
    if node.op not in ("call_function", "call_method"):
        return False
    return (
        node.target in IN_PLACE_OPERATORS or call_writes(node) or bool(_argument(node, "inplace"))
    )


@cache
def _signature(target: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of a function by its name, however it was given."""
    if name in node.kwargs or node.op != "call_function":
        return node.kwargs.get(name)
    signature = _signature(node.target)
    if signature is None or name not in signature.parameters:
        return None
    try:
        return signature.bind(*node.args, **node.kwargs).arguments.get(name)
    except TypeError:
        return None
