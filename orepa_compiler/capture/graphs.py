"""The graphs of a capture; those of layers that are not torch's own are traced when asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from orepa_compiler.algebra.layers import has_torch_forward
from orepa_compiler.algebra.overriding import answers_itself
from orepa_compiler.capture import Capture
from orepa_compiler.capture.effects import seen_of
from orepa_compiler.capture.tracing import trace


@dataclass
class Graphs:
    """Finds the graph of each forward of a capture, once."""

    capture: Capture
    _graphs: dict[str, fx.Graph | None] = field(default_factory=dict, init=False)
    _owners: dict[fx.Graph, str] = field(default_factory=dict, init=False)

    def graph(self, owner: str) -> fx.Graph | None:
        """The graph of the owner's forward; of a layer that is not torch's own, made when asked."""
        if owner not in self._graphs:
            self._graphs[owner] = graph = self._found(owner)
            if graph is not None:
                self._owners[graph] = owner
        return self._graphs[owner]

    def _found(self, owner: str) -> fx.Graph | None:
        if owner in self.capture.graphs or owner in self.capture.untraced:
            return self.capture.graphs.get(owner)
        module = self.capture.module(owner)
        is_layer = not (module._modules or has_torch_forward(module) or answers_itself(module))
        traced = trace(module) if is_layer else ""
        return None if isinstance(traced, str) or seen_of(traced).steers else traced

    def owner_of(self, node: fx.Node) -> str | None:
        """The module whose forward a node stands in, if its graph was asked for."""
        return self._owners.get(node.graph)
