"""What a forward does beside computing, and a graph of it does not hold.

It switches gradients or autocast for a part, sets attributes, or writes over its buffers, which a
trace does once and does not write down. A forward that is written anew would do none of this; one
whose children are swapped still does all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.amp.autocast_mode import autocast

_KEY, _WRITTEN = "effects", "written"
_OWN = ("_parameters", "_buffers", "_modules")


class Effects:
    """Watches a forward while it is traced. found: what it does, in words. written: its buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.found: dict[str, None] = {}
        self.written: set[str] = set()

    def look(self) -> None:
        """To be called whenever something is computed."""
        if not torch.is_grad_enabled():
            self.found["switches gradients off"] = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """With gradients on; sees autocast, and what the module has that is another afterwards."""
        attributes, versions = _attributes(self.module), _versions(self.module)
        enter = autocast.__enter__

        def entered(context: autocast) -> Any:
            self.found["switches autocast"] = None
            return enter(context)

        autocast.__enter__ = entered  # type: ignore[method-assign]
        try:
            with torch.enable_grad():
                yield
        finally:
            autocast.__enter__ = enter  # type: ignore[method-assign]
            self.written = _changed(versions, _versions(self.module))
            changed = _changed(attributes, _attributes(self.module)) | self.written
            self.found |= dict.fromkeys(f"changes its {name}" for name in sorted(changed))

    def note(self, graph: fx.Graph) -> None:
        """Writes what was found into the graph."""
        if self.found:
            _output(graph).meta |= {_KEY: " and ".join(self.found), _WRITTEN: self.written}


def written_buffers(graph: fx.Graph | None) -> set[str]:
    """The buffers that a forward wrote over while it was traced."""
    return set() if graph is None else _output(graph).meta.get(_WRITTEN, set())


def effects_of(graph: fx.Graph | None) -> str | None:
    """What the forward of a graph does beside computing, or None."""
    return None if graph is None else _output(graph).meta.get(_KEY)


def _output(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that are set on a module, by identity, with what containers hold."""
    made_by_trace = "_tensor_constant"
    return {
        name: (id(value), _inside(value))
        for name, value in vars(module).items()
        if name not in _OWN and not name.startswith(made_by_trace)
    }


def _versions(module: nn.Module) -> dict[str, Any]:
    """How often each buffer was written over; one made in inference mode does not tell."""
    return {
        name: (id(buffer), 0 if buffer.is_inference() else buffer._version)
        for name, buffer in module.named_buffers()
    }


def _changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in after if after[name] != before.get(name)}


def _inside(value: Any) -> tuple[int, ...]:
    if isinstance(value, dict):
        return tuple(map(id, (*value.keys(), *value.values())))
    return tuple(map(id, value)) if isinstance(value, (list, tuple, set)) else ()
