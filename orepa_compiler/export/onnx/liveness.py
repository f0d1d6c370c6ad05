"""Finds what of a traced forward reaches its outputs: some compute more than they return.

A program of torch.export keeps all that ran: heads of deep supervision, losses, counters. A file
holds what is read, so that is what is judged.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

# They give their input back in eval mode, and their schema does not say so.
_PASSING = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


def live_nodes(program: ExportedProgram) -> set[fx.Node]:
    """Finds the nodes of a traced program that its outputs depend on, those of bodies included.

    A write counts where what is written over is read: y.relu_() of a result that nobody takes does
    not.
    """
    modules = program.graph_module.modules()
    graphs = [module.graph for module in modules if isinstance(module, fx.GraphModule)]
    return {node for graph in graphs for node in _live_in(graph)}


def _live_in(graph: fx.Graph) -> set[fx.Node]:
    live: set[fx.Node] = set()
    _reach(live, (node for node in graph.nodes if node.op == "output"))
    writes = {node: roots for node in graph.nodes if (roots := set(_written(node)))}
    grows = True
    while grows:
        before, read = len(live), {_root(node) for node in live}
        _reach(live, (node for node, roots in writes.items() if roots & read))
        grows = len(live) > before
    return live


def _reach(live: set[fx.Node], nodes: Iterator[fx.Node]) -> None:
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting += node.all_input_nodes


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """Finds the nodes whose memory a node writes over."""
    if isinstance(node.target, torch._ops.OpOverload):
        for index, argument in enumerate(node.target._schema.arguments):
            given = _given(node, index, argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from (_root(n) for n in _nodes(given))


def _given(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def _nodes(given: Any) -> list[fx.Node]:
    values = given if isinstance(given, (list, tuple)) else [given]
    return [value for value in values if isinstance(value, fx.Node)]


def _root(node: fx.Node) -> fx.Node:
    """Finds the node whose memory this one gives: the node itself, but for views and writes."""
    while _gives_what_it_reads(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _gives_what_it_reads(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    is_passing = schema.name.removeprefix("aten::") in _PASSING
    return is_passing or any(made.alias_info is not None for made in schema.returns)
