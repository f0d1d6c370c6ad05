"""Finds norms right behind a conv, with the border of a module between the two.

A stem written as Sequential(..., conv) with its norm in the parent, or a conv whose norm is the
first layer of the module that follows: no single graph shows the pair, but nothing else is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from orepa_compiler.algebra.classifiers import is_batch_norm, is_idle
from orepa_compiler.algebra.layers import linear_part
from orepa_compiler.analysis.regions import Interpreter, Region
from orepa_compiler.analysis.values import LinearValue, maximal
from orepa_compiler.blocks.own_forward import own_conv
from orepa_compiler.capture import Call, Capture
from orepa_compiler.capture.constants import reads_form
from orepa_compiler.capture.forwards import Read
from orepa_compiler.errors import NotLinear
from orepa_compiler.passes.collapse.absorption import absorbs_norm


def crossings(interpreter: Interpreter) -> Iterator[tuple[Region | str, str]]:
    """What ends in a conv, each with the path of the norm that alone reads its output.

    A region; or, of a conv that is no operator but can take a norm, its path.
    """
    for owner in interpreter.capture.graphs:
        for value in maximal(interpreter.values(owner)):
            norm = value.nodes[0] if value.layers == 1 and not value.convs else None
            if norm is None or norm.op != "call_module":
                continue
            if interpreter.remaining_reads(owner, value.nodes):
                continue
            path = interpreter.capture.path_of(Call(owner, norm))
            if not is_batch_norm(interpreter.capture.module(path)):
                continue
            end = _conv_end(interpreter, owner, value.source, norm)
            if end is not None and _fits(interpreter, end, path):
                yield end, path


def _fits(interpreter: Interpreter, end: Region | str, norm: str) -> bool:
    """Whether the norm means the axis that the channels of the conv stand on."""
    if isinstance(end, str):
        return True
    try:
        with_norm(end.value, norm, interpreter.read)
    except NotLinear:
        return False
    return True


def with_norm(value: LinearValue, path: str, read: Read) -> LinearValue:
    """The value followed by the norm at `path`, without the activation that may be inside it."""
    norm, _ = linear_part(read(path))
    assert value.operator is not None
    device = value.operator.weight.device
    joined = norm.to(torch.float64, device) @ value.operator
    return replace(value, operator=joined)


def _conv_end(
    interpreter: Interpreter, owner: str, node: fx.Node, user: fx.Node
) -> Region | str | None:
    """The region, or the path of the conv, whose value reaches `user` and nobody else."""
    for call in reaching(interpreter.capture, owner, node, user):
        value = interpreter.values(call.owner).get(call.node)
        if value is not None:
            is_conv = value.operator is not None and value.operator.rank > 0  # and no linear layer
            ends_in_conv = value.convs and value.rest is None and is_conv
            stays = interpreter.remaining_reads(call.owner, value.nodes)
            is_part = not is_maximal(interpreter, call.owner, value)  # which ends behind the norm
            is_end = ends_in_conv and not stays and not is_part
            return Region(call.owner, value) if is_end else None
        path = called_alone(interpreter.capture, call)
        if path and absorbs_norm(own_conv(interpreter.capture.module(path))):
            return path
    return None


def is_maximal(interpreter: Interpreter, owner: str, value: LinearValue) -> bool:
    """Whether a value is part of no larger one in the forward of its owner."""
    return any(value is other for other in maximal(interpreter.values(owner)))


def reaching(capture: Capture, owner: str, node: fx.Node, user: fx.Node) -> Iterator[Call]:
    """The nodes that give the one value that `user` reads, and nobody else; outer ones first.

    A module's call, then the node that its output is; a module's input, then what its caller gives.
    Two axes that one module exchanges, and the next puts back, are nothing between the two.
    """
    exchanged: frozenset[object] | None = None
    while _reads_alone(node, user) and owner not in capture.doubtful:
        if exchanged is None:
            yield Call(owner, node)
        axes = _exchanged_axes(node)
        if axes is not None and exchanged in (None, axes):
            exchanged = axes if exchanged is None else None
            owner, node, user = owner, node.all_input_nodes[0], node
            continue
        found = across(capture, owner, node)
        if found is None:
            return
        owner, node, user = found


def _reads_alone(node: fx.Node, user: fx.Node) -> bool:
    """Whether nobody else reads the values of a node; who asks for its shape reads none."""
    return user in node.users and all(each is user or reads_form(each) for each in node.users)


def _exchanged_axes(node: fx.Node) -> frozenset[object] | None:
    """The two axes that a transposition exchanges, as they are named; None for anything else."""
    is_call = node.op in ("call_method", "call_function") and not node.kwargs
    name = getattr(node.target, "__name__", node.target)
    if not is_call or name != "transpose" or len(node.args) != 3:
        return None
    axes = frozenset(node.args[1:])
    return axes if all(isinstance(axis, int) for axis in axes) else None


def called_alone(capture: Capture, call: Call) -> str | None:
    """The path of the module that a node calls, if that is its one use."""
    path = capture.path_of(call) if call.node.op == "call_module" else ""
    return path if path and capture.refusal(path) is None else None


def across(capture: Capture, owner: str, node: fx.Node) -> tuple[str, fx.Node, fx.Node] | None:
    """Step over a module's border, or a node that does nothing: the owner, the node, its user."""
    if node.op == "placeholder" and owner and capture.refusal(owner) is None:
        (call,) = capture.calls[owner]
        inputs = [n for n in node.graph.nodes if n.op == "placeholder"]
        index, args = inputs.index(node), call.node.args  # the first inputs get the arguments
        source = args[index] if index < len(args) else None
        if isinstance(source, fx.Node) and _times_given(call.node, source) == 1:
            return call.owner, source, call.node
    path = called_alone(capture, Call(owner, node))
    if path and is_idle(capture.module(path)) and len(node.all_input_nodes) == 1:
        return owner, node.all_input_nodes[0], node
    if path and path in capture.graphs:
        output = next(iter(reversed(capture.graphs[path].nodes)))
        if isinstance(output.args[0], fx.Node):
            return path, output.args[0], output
    return None


def _times_given(call: fx.Node, value: fx.Node) -> int:
    """How often a value stands among the arguments of a call."""
    given: list[fx.Node] = []
    fx.node.map_arg((call.args, call.kwargs), given.append)
    return sum(node is value for node in given)
