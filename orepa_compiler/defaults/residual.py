"""Finds residual connections: ways past an activation that meet again behind it.

Hu et al. 2022 (Sec. 4.5, supplement Sec. 2.4): residual connections connect feature maps across
activations, and give a net what the norms of explicit branches give one without. RepVGG's identity
branch crosses no activation, so its nets count as residual-free. A concatenation is as good as a
sum: the conv that reads it adds what it makes of its parts (DenseNet).

As `following`, it only chooses defaults: where the dataflow is not known, a net counts as residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orepa_compiler.algebra.classifiers import (
    is_batch_norm,
    is_conv_like,
    is_dropout,
    is_norm,
)
from orepa_compiler.algebra.layers import linear_part
from orepa_compiler.analysis.elementwise import is_add
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import Call, Capture
from orepa_compiler.defaults.following import ACTIVATION, GATE, NORM, PASSED, role_of
from orepa_compiler.errors import NotLinear

_CONCATENATIONS = ("cat", "concat", "concatenate")
_APPENDS = ("append", "extend", "insert")


@dataclass(frozen=True)
class _Edge:
    """A value, given by the call that makes it, and one that reads it; what the reader is."""

    source: Call
    target: Call
    is_activation: bool
    may_be_activation: bool


_Flow = Mapping[Call, list[_Edge]]


def residual_reason(capture: Capture) -> str | None:
    """Why the net counts as one with residual connections, or None where it has none."""
    for path in (*capture.untraced, *capture.recorded):
        if _holds_conv(capture, path):
            return f"the dataflow in {path or 'the model'} is not known"
    flow = _flow(capture)
    if isinstance(flow, str):
        return flow
    for start, edges in flow.items():
        if len(edges) > 1 and (join := _joined_behind(flow, start)):
            return f"{join.node.name} in {join.owner or 'the model'} adds what passed an activation"
    return None


def is_summed(capture: Capture, path: str) -> bool:
    """Whether a conv's output is added to another before any activation: one of several branches.

    Such a sum is linear (RepVGG's), or the end of a residual connection.
    """
    seen, open_ends = set(), list(capture.calls.get(path, []))
    while open_ends:
        call = open_ends.pop()
        for target in capture.consumers(call):
            if target is None or target in seen:
                continue
            seen.add(target)
            if is_add(target.node):
                return True
            if role_of(capture, target) in (NORM, PASSED) and not _hides_activation(
                capture, target
            ):
                open_ends.append(target)
    return False


def _flow(capture: Capture) -> _Flow | str:
    """Who reads whose value, over the borders of modules; or why that is not known."""
    flow: dict[Call, list[_Edge]] = {}
    for owner, graph in capture.graphs.items():
        for node in graph.nodes:
            call = Call(owner, node)
            for target in capture.consumers(call) if node.op != "output" else ():
                if target is None or (kind := role_of(capture, target)) is None:
                    continue
                if _is_opaque(capture, target):
                    return f"the dataflow in {target.owner or 'the model'} is not known"
                flow.setdefault(call, []).append(_edge(capture, call, target, kind))
    return flow


def _edge(capture: Capture, call: Call, target: Call, kind: str) -> _Edge:
    is_activation = (
        kind == ACTIVATION or kind.startswith(GATE) or _hides_activation(capture, target)
    )
    return _Edge(call, target, is_activation, is_activation or _is_own_layer(capture, target))


def _is_own_layer(capture: Capture, target: Call) -> bool:
    """Whether it is a layer of the user's own: it may well be an activation, or hold one."""
    if target.node.op != "call_module":
        return False
    path = capture.path_of(target)
    module = capture.module(path)
    is_torch = type(module).__module__.startswith("torch.nn.")
    is_known = is_torch or is_norm(module) or is_dropout(module) or is_conv_like(module)
    has_kernel = path not in capture.graphs and any(True for _ in module.parameters())
    return not (is_known or has_kernel)


def _is_opaque(capture: Capture, target: Call) -> bool:
    """Whether a value goes where no graph shows it: into a list, into a module with convs."""
    if target.node.op == "output" or target.node.target in _APPENDS:
        return True
    if target.node.op != "call_module" or capture.path_of(target) not in capture.graphs:
        return False
    return _holds_conv(capture, capture.path_of(target))


def _holds_conv(capture: Capture, path: str) -> bool:
    modules = capture.module(path).modules()
    return any(is_conv_like(module) or isinstance(module, ConvBlock) for module in modules)


def _hides_activation(capture: Capture, target: Call) -> bool:
    """Whether it is a norm with an activation inside."""
    if target.node.op != "call_module":
        return False
    module = capture.module(capture.path_of(target))
    try:
        return is_batch_norm(module) and linear_part(module)[1] is not None
    except NotLinear:
        return False


def _joined_behind(flow: _Flow, start: Call) -> Call | None:
    """Where a value meets what an activation made of it, without having passed one itself."""
    near = [edge for edge, passed in _reached(flow, start) if not passed and _joins(edge)]
    if not near:
        return None
    far = [edge for edge, passed in _reached(flow, start, beyond=True) if passed and _joins(edge)]
    pairs = ((a, b) for a in near for b in far if a.target == b.target and a.source != b.source)
    return next((a.target for a, _ in pairs), None)


def _joins(edge: _Edge) -> bool:
    node = edge.target.node
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return is_add(node) or (node.op != "call_module" and name in _CONCATENATIONS)


def _reached(flow: _Flow, start: Call, *, beyond: bool = False) -> Iterator[tuple[_Edge, bool]]:
    """Every edge that the value at start flows along, and whether it passed an activation first.

    beyond: go on behind activations.
    """
    seen, open_ends = {(start, False)}, [(start, False)]
    while open_ends:
        call, passed = open_ends.pop()
        for edge in flow.get(call, []):
            yield edge, passed
            states = {passed or edge.is_activation, passed or edge.may_be_activation}
            for state in states:
                if (edge.target, state) not in seen and (beyond or not state):
                    seen.add((edge.target, state))
                    open_ends.append((edge.target, state))
