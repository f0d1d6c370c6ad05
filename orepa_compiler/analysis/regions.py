"""Linear regions: parts of a forward that compute one convolution.

A forward is interpreted over the algebra (abstract interpretation of its fx graph): the value of a
node is an operator applied to some earlier node, its source. A region is a maximal set of nodes
with one source and one output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from orepa_compiler.analysis.context import Interpretation
from orepa_compiler.analysis.values import LinearValue, joined, maximal
from orepa_compiler.analysis.walk import Walk
from orepa_compiler.capture import Call, ancestors
from orepa_compiler.errors import ReparamError


@dataclass(frozen=True)
class Region:
    """A maximal linear region in the forward of the module at path `owner`."""

    owner: str
    value: LinearValue

    @property
    def is_path(self) -> bool:
        """Whether it is a chain of layers, so that its children can be swapped."""
        return all(node.op == "call_module" for node in self.value.nodes)

    @property
    def node_names(self) -> list[str]:
        return [node.name for node in self.value.nodes]


@dataclass
class Interpreter(Interpretation):
    """Interprets the graphs of a capture, each module once."""

    walk: ClassVar[type[Walk]] = Walk  # how one forward is gone over

    _whole: dict[str, LinearValue | None] = field(default_factory=dict)
    _values: dict[str, dict[fx.Node, LinearValue]] = field(default_factory=dict)
    _open: set[str] = field(default_factory=set)

    def values(self, owner: str) -> dict[fx.Node, LinearValue]:
        """The linear value of each node of the owner's forward that has one."""
        if owner not in self._values:
            self._open.add(owner)
            self._values[owner] = self.walk(self, owner).over(self._nodes(owner))
            self._open.remove(owner)
        return self._values[owner]

    def _nodes(self, owner: str) -> Iterable[fx.Node]:
        """The nodes to interpret: the calls of layers alone, where no forward can be written anew.

        A recording shows chains of layers, and no more than that.
        """
        graph = self.graph(owner)
        if graph is None or owner in self.capture.doubtful:
            return ()
        stays = owner in self.capture.recorded or self.capture.rewrite_refusal(owner)
        return (node for node in graph.nodes if not stays or node.op == "call_module")

    def is_open(self, owner: str) -> bool:
        """Whether the owner's forward is being interpreted right now."""
        return owner in self._open

    def value_of(self, owner: str, nodes: Sequence[str], paths: Sequence[str] = ()) -> LinearValue:
        """The value of a region that a plan found, by the names of its nodes.

        paths: its layers in order, where it is a chain of layers; enough where the forward that
        was recorded for the plan has no graph now.
        """
        if owner in self.capture.untraced and paths:
            return self._chain(paths)
        if self.graph(owner) is None:
            reason = self.capture.untraced.get(owner, "no module with a forward of its own is here")
            raise ReparamError(f"the plan does not fit: {reason}", path=owner)
        named = (node for node in self._nodes(owner) if node.name in nodes)
        values = self.walk(self, owner).over(named)
        last = next(reversed(values.values()), None)
        if last is None or [node.name for node in last.nodes] != list(nodes):
            raise ReparamError(f"the plan does not fit: no region {', '.join(nodes)}", path=owner)
        return last

    def _chain(self, paths: Sequence[str]) -> LinearValue:
        node = source = fx.Graph().placeholder("x")
        walk = self.walk(self, "")
        for path in paths:
            layer, before = walk.layer(path, node), walk.values.get(node)
            if layer is None:
                raise ReparamError("the plan does not fit: it is not linear", path=path)
            node = source.graph.call_module(path, (node,))
            one = joined(layer, before, node, at_any_cost=True) if before else None
            walk.values[node] = one or replace(layer, nodes=(node,))
        return walk.values[node]

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

    def whole(self, path: str) -> LinearValue | None:
        """A module's forward as one linear value from its first input to its output, if it is."""
        if path not in self._whole:
            is_recorded = path in self.capture.recorded
            self._whole[path] = None if is_recorded else self._whole_value(path)
        return self._whole[path]

    def _whole_value(self, path: str) -> LinearValue | None:
        graph = self.graph(path)
        if graph is None:
            return None
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        output = next(iter(reversed(graph.nodes))).args[0]
        if any(node.users for node in placeholders[1:]) or not isinstance(output, fx.Node):
            return None
        value = self.values(path).get(output)
        if value is None or value.rest is not None or value.source not in placeholders[:1]:
            return None
        # What the forward writes over its input changes what a part of it that stands alone reads.
        aside = set(graph.nodes) - set(value.nodes)
        overwrites = self.memory.overwrites
        return None if any(overwrites(path, n, value.source) for n in aside) else value
