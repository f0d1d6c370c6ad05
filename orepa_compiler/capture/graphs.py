"""The graphs of a capture; those of layers that are not torch's own are traced when asked for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from orepa_compiler.algebra.overriding import answers_itself, has_torch_forward
from orepa_compiler.capture import Capture
from orepa_compiler.capture.effects.finding import seen_of
from orepa_compiler.capture.tracing.forward import trace


@dataclass
class Graphs:
    """Finds the graph of each forward of a capture, once."""

    capture: Capture

    def graph(self, owner: str) -> fx.Graph | None:
        """The graph of the owner's forward; of a layer that is not torch's own, made when asked."""
        known = self.capture.layer_graphs
        if owner not in known:
            known[owner] = self._found(owner)
        return known[owner]

    def _found(self, owner: str) -> fx.Graph | None:
        if owner in self.capture.graphs or owner in self.capture.untraced:
            return self.capture.graphs.get(owner)
        module = self.capture.module(owner)
        is_layer = not (module._modules or has_torch_forward(module) or answers_itself(module))
        traced = trace(module) if is_layer else ""
        return None if isinstance(traced, str) or seen_of(traced).steers else traced
