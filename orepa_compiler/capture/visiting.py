"""Visiting forwards: each is traced as it is called, where its caller's trace calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from orepa_compiler.capture.arguments import (
    Arguments,
    arguments_of,
    bound_forward,
    usual_arguments,
)
from orepa_compiler.capture.calls import join
from orepa_compiler.capture.effects.finding import Surroundings, seen_of
from orepa_compiler.capture.likeness import Likeness, is_plain
from orepa_compiler.capture.tracing.forward import has_forward, made_up, trace
from orepa_compiler.capture.tracing.tracer import OPAQUE

_TWO_WAYS = "it is called in different ways"


@dataclass
class _Trace:
    """One way to call a forward: its arguments, its graph or why there is none, what it calls."""

    arguments: Arguments | None
    graph: fx.Graph | str = ""
    calls: list[tuple[str, Arguments]] = field(default_factory=list)  # by the owner's own targets

    @property
    def is_plain(self) -> bool:
        """Whether it tells of an alike module too: no tensor or module of this one is in it."""
        given = [a for a in (self.arguments, *(call[1] for call in self.calls)) if a is not None]
        if isinstance(self.graph, fx.Graph) and (
            made_up(self.graph) or not seen_of(self.graph).is_plain
        ):
            return False
        return all(is_plain(dict(a.constants)) for a in given)

    def copy(self) -> _Trace:
        graph = self.graph if isinstance(self.graph, str) else copy.deepcopy(self.graph)
        return _Trace(self.arguments, graph, self.calls)


@dataclass
class Visits:
    """The forwards of a skeleton, each traced once for each way in which it is called.

    Where modules are alike, one of them is traced for all.

    modules: by path. aliases: path -> all paths of the module. has_graph: whether the forward of a
    module is of interest. is_leaf: whether what a module returns is known without its forward.
    around: the model. graphs: path -> the graph, or why there is none.
    """

    modules: Mapping[str, nn.Module]
    aliases: Mapping[str, tuple[str, ...]]
    has_graph: Callable[[nn.Module], bool]
    is_leaf: Callable[[nn.Module], bool]
    around: Surroundings
    graphs: dict[str, fx.Graph | str] = field(default_factory=dict, init=False)
    _traces: dict[str, list[_Trace]] = field(default_factory=dict, init=False)
    _changes: list[tuple[str, fx.Graph | str | None]] = field(default_factory=list, init=False)
    _first: dict[int, list[_Trace]] = field(default_factory=dict, init=False)
    _likeness: Likeness = field(init=False)

    def __post_init__(self) -> None:
        self._likeness = Likeness(self.modules, self.aliases)

    def visit(self, path: str, calls: Iterable[Arguments] = ()) -> None:
        """Trace the forward at a path, and those that it calls, unless a caller's trace did.

        calls: from outside of the model; where there is no call at all, the usual one is meant.
        """
        for arguments in calls:
            self._returned(path, arguments)
        if path not in self.graphs:
            forward = bound_forward(self.modules[path])
            self._returned(path, usual_arguments(forward))

    def visit_called(self, owner: str, recorded: fx.Graph) -> None:
        """Trace what a forward that was recorded calls, as it was called."""
        for node in recorded.nodes:
            arguments = node.meta.get("arguments")
            if node.op == "call_module" and arguments is not None:
                path = self._path(owner, str(node.target))
                if self.has_graph(self.modules[path]):
                    self._returned(path, arguments)

    def arguments(self) -> dict[str, Arguments]:
        """Path -> the arguments that its graph was traced with."""
        return {
            path: made.arguments
            for path, traces in self._traces.items()
            for made in traces
            if made.graph is self.graphs.get(path) and made.arguments is not None
        }

    def _path(self, owner: str, target: str) -> str:
        return self.aliases[join(owner, target)][0]

    def _returned(self, path: str, arguments: Arguments | None) -> Any:
        """What a call with such arguments returns: nodes of the graph of what it calls."""
        graph = self._traced(path, arguments)
        known = self.graphs.get(path)
        if known is None:
            self._set(path, graph)
        elif known is not graph and str(known) != str(graph):
            self._set(path, _TWO_WAYS)
        return OPAQUE if isinstance(graph, str) else _output(graph)

    def _traced(self, path: str, arguments: Arguments | None) -> fx.Graph | str:
        traces = self._traces.setdefault(path, [])
        made = next((t for t in traces if _same(t.arguments, arguments)), None)
        if made is None and (alike := self._alike(path, arguments)):
            made = alike.copy()
            traces.append(made)
        if made is None:
            made = self._new_trace(path, arguments)
            traces.append(made)
        elif not isinstance(made.graph, str):
            for target, given in made.calls:
                self._returned(self._path(path, target), given)
        return made.graph

    def _new_trace(self, path: str, arguments: Arguments | None) -> _Trace:
        made, mark = _Trace(arguments), len(self._changes)

        def called(target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            child = self._path(path, target)
            module = self.modules[child]
            given = arguments_of(bound_forward(module), args, kwargs)
            if given is None:  # the call will raise
                return OPAQUE
            if self.has_graph(module):
                made.calls.append((target, given))
                return self._returned(child, given)
            return self._output_of(module, given)

        module = self.modules[path]
        number = self._likeness.number(module) if path else None  # before a trace leaves tensors
        made.graph = trace(module, arguments, called, is_model=not path, around=self.around)
        if isinstance(made.graph, str):
            self._undo(mark)  # how it calls its children is not known to the end
        broken = self.around.broken.get(path)  # what it reads is told by its own paths
        if number is not None and made.is_plain and (broken is None or broken.is_plain):
            self._first.setdefault(number, []).append(made)
        return made

    def _alike(self, path: str, arguments: Arguments | None) -> _Trace | None:
        """The trace of a module that is alike, called in the same way."""
        number = self._likeness.number(self.modules[path]) if path else None
        if number is None:
            return None
        known = self._first.get(number, ())
        return next((made for made in known if _same(made.arguments, arguments)), None)

    def _output_of(self, module: nn.Module, arguments: Arguments) -> Any:
        """What a module returns whose graph is of no other interest: it holds no layer."""
        is_empty = not module._modules and not module._parameters
        if self.is_leaf(module) or not is_empty or not has_forward(module):
            return OPAQUE
        graph = trace(module, arguments, around=self.around)
        return OPAQUE if isinstance(graph, str) else _output(graph)

    def _set(self, path: str, graph: fx.Graph | str) -> None:
        self._changes.append((path, self.graphs.get(path)))
        self.graphs[path] = graph

    def _undo(self, mark: int) -> None:
        while len(self._changes) > mark:
            path, before = self._changes.pop()
            if before is None:
                del self.graphs[path]
            else:
                self.graphs[path] = before


def _output(graph: fx.Graph) -> Any:
    nodes: Iterator[fx.Node] = iter(reversed(graph.nodes))
    return next(nodes).args[0]


def _same(one: Arguments | None, two: Arguments | None) -> bool:
    try:
        return bool(one == two)
    except Exception:  # of constants that cannot be compared
        return False
