"""Finds norms right before a conv, with the border of a module between the two.

W (f x + s) + b = (W f) x + (W s + b), where the conv pads nothing. In one graph this is a region
like any other; a net that normalizes first has the norm in the block, the conv in what it calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile

import torch
from torch import fx

from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.algebra.layers import linear_part
from orepa_compiler.analysis.regions import Interpreter, Region
from orepa_compiler.analysis.values import LinearValue, maximal
from orepa_compiler.capture import Call
from orepa_compiler.capture.constants import reads_form
from orepa_compiler.capture.forwards import Read
from orepa_compiler.errors import NotLinear
from orepa_compiler.passes.collapse.norms_behind import across, called_alone


def preceding_norms(interpreter: Interpreter) -> Iterator[tuple[Region, str]]:
    """What begins with a conv, each with the path of the norm that it alone reads."""
    for owner in interpreter.capture.graphs:
        for value in maximal(interpreter.values(owner)):
            if value.convs and not interpreter.remaining_reads(owner, value.nodes):
                norm = _norm(interpreter, owner, value)
                if norm is not None and _fits(interpreter, value, norm):
                    yield Region(owner, value), norm


def after_norm(value: LinearValue, path: str, read: Read) -> LinearValue:
    """The value of the norm at `path` as its input. Raises NotLinear where that is no one conv."""
    norm, rest = linear_part(read(path))
    if rest is not None:
        raise NotLinear("an activation stands between the norm and the conv")
    op = value.operator
    assert op is not None
    return replace(value, operator=op @ norm.to(torch.float64, op.weight.device))


def _norm(interpreter: Interpreter, owner: str, value: LinearValue) -> str | None:
    """The path of the norm whose output a value has for its source, and nobody else reads."""
    capture, node = interpreter.capture, value.source
    readers, last = set(value.nodes), value.nodes[-1]
    while {user for user in node.users if not reads_form(user)} <= readers:
        if owner in capture.doubtful or owner in capture.recorded:
            return None
        if not _is_quiet(interpreter, owner, node, last, readers):
            return None
        path = called_alone(capture, Call(owner, node))
        if path and is_batch_norm(capture.module(path)):
            return path
        found = across(capture, owner, node)
        if found is None:
            return None
        owner, node, last = found
        readers = {last}
    return None


def _fits(interpreter: Interpreter, value: LinearValue, norm: str) -> bool:
    try:
        one = after_norm(value, norm, interpreter.read).operator
    except NotLinear:
        return False
    return one is not None and one.macs <= value.macs


def _is_quiet(
    interpreter: Interpreter, owner: str, first: fx.Node, last: fx.Node, readers: set[fx.Node]
) -> bool:
    """Whether nothing between the norm and the conv may write over what the conv will then read.

    That is the input of the norm, or of what holds it.
    """
    read = first.all_input_nodes or [first]
    nodes = list(first.graph.nodes)
    between = takewhile(lambda node: node is not last, nodes[nodes.index(first) + 1 :])
    return not any(
        interpreter.memory.overwrites(owner, node, value)
        for node in between
        for value in read
        if node not in readers
    )
