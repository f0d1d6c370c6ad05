"""Traces the fx graph of a module's own forward, with its children as leaves."""

from __future__ import annotations

import inspect
import operator
import textwrap
from collections.abc import Sequence
from functools import singledispatchmethod
from typing import Any

import torch
from torch import fx, nn

from orepa_compiler.capture.arguments import Arguments, bound_forward, usual_arguments
from orepa_compiler.capture.effects.finding import Effects, Surroundings, keep_, output
from orepa_compiler.capture.tracing.bytecode import type_reason
from orepa_compiler.capture.tracing.kinds import inferred_type, kind_of_leaf
from orepa_compiler.capture.tracing.patching import traced_by
from orepa_compiler.capture.tracing.proxies import answering
from orepa_compiler.capture.tracing.tracer import OPAQUE, ChildrenAreLeaves, Returned

_LONGEST = 120  # characters of an error that a forward raised


def trace(
    module: nn.Module,
    arguments: Arguments | None = None,
    returned: Returned | None = None,
    *,
    is_model: bool = False,
    around: Surroundings | None = None,
) -> fx.Graph | str:
    """The graph of the module's own forward, or why there is none.

    arguments: those of its calls; those of the usual call where nothing is known.
    returned: tells what a call of a child gives; without it, one value of an unknown type.
    is_model: whether it is the user who calls it. around: the model that it is a part of.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript"
    forward = _forward_name(module)
    if forward is None:
        return "a function took its place on this object"
    if isinstance(inspect.getattr_static(type(module), forward), singledispatchmethod):
        return "it asks for the type of what it is given (functools.singledispatchmethod)"
    arguments = arguments or usual_arguments(bound_forward(module))
    if arguments is None:
        return "its arguments cannot be told from its signature"
    iterates = getattr(type(module), "__iter__", None) is nn.Sequential.__iter__
    if iterates and getattr(type(module), forward) is nn.Sequential.forward:
        return _chain(module, arguments, returned)

    def traced(*, buffers: bool) -> fx.Graph | str:
        tracer = ChildrenAreLeaves(
            forward=forward,
            buffers=buffers,
            arguments=arguments,
            returned=returned,
            is_model=is_model,
            around=around,
        )
        return _traced(tracer, module)

    graph = traced(buffers=False)
    if isinstance(graph, str) or not (made := made_up(graph)):
        return graph
    for name in made:
        vars(module).pop(name, None)
    again = traced(buffers=True)  # a tensor made of buffers is no attribute
    return traced(buffers=False) if isinstance(again, str) else again


def has_forward(module: nn.Module) -> bool:
    """Whether the module can be called: by its class, or by what was set on the object."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _forward_name(module: nn.Module) -> str | None:
    """The method of its class that the module runs when it is called, or None for another function.

    A module may choose: self.forward = self.forward_slow.
    """
    chosen = vars(module).get("forward")
    if chosen is None:
        return "forward"
    name = getattr(chosen, "__name__", "")
    is_method = getattr(chosen, "__self__", None) is module
    same = is_method and getattr(type(module), name, None) is getattr(chosen, "__func__", chosen)
    return name if same else None


def _traced(tracer: ChildrenAreLeaves, module: nn.Module) -> fx.Graph | str:
    tracer.effects = effects = Effects(module, tracer.around, tracer.traced_func_name)
    if reason := type_reason(effects.functions):
        return reason
    try:
        with answering(), effects.watching(), traced_by(tracer):
            graph = tracer.trace(module)
    except Exception as error:  # a forward is the user's code: anything may come out of it
        tracer.around.found_before_error(module, effects.seen())
        message = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {textwrap.shorten(message, _LONGEST, placeholder=' ...')}"
    if tracer.stopped_by:
        tracer.around.found_before_error(module, effects.seen())
        return f"TraceError: {tracer.stopped_by}, and goes on where that fails"
    _keep(graph, [proxy.node for proxy in effects.kept])
    effects.note(graph)
    for node in reversed(graph.nodes):
        if not node.users and (node.target is operator.getitem or node.op == "get_attr"):
            graph.erase_node(node)  # a part that nobody takes, a weight whose form was asked for
        elif "is_wrapped" in node.meta:
            node.target = _unwrapped(node.target)
    return graph


def _keep(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Readers for the values that the forward leaves somewhere, so that they stay what they are."""
    with graph.inserting_before(output(graph)):
        for node in dict.fromkeys(nodes):
            if node.graph is graph:
                graph.call_function(keep_, (node,))


def _unwrapped(function: Any) -> Any:
    """A function that fx wraps while it traces; a trace in a trace wraps it once more."""
    while getattr(function, "__globals__", {}).get("__name__") == fx._symbolic_trace.__name__:
        function = function.__wrapped__
    return function


def made_up(graph: fx.Graph) -> list[str]:
    """The tensors that the forward computed while it was traced, and that now stand for it."""
    targets = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    return [target for target in targets if target.startswith("_tensor_constant")]


def _chain(module: nn.Module, arguments: Arguments, returned: Returned | None) -> fx.Graph:
    """The graph that a trace of nn.Sequential gives, at a hundredth of its cost."""
    graph = fx.Graph()
    node = graph.placeholder("input")
    node.meta["kind"] = arguments.kinds.get("input")
    for name, child in module._modules.items():
        value = OPAQUE if returned is None else returned(name, (node,), {})
        before, node = node, graph.call_module(name, (node,))
        if isinstance(value, fx.Node):
            node.meta["kind"] = inferred_type(value)
        elif value is not OPAQUE:
            node.meta["kind"] = type(value)
        elif isinstance(child, nn.Identity):
            node.meta["kind"] = inferred_type(before)
        else:
            node.meta["kind"] = kind_of_leaf(child, ())
    graph.output(node)
    return graph
