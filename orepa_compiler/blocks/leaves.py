"""Makes a block one call in graphs of torch.fx, as a conv is."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from orepa_compiler.errors import ReparamError


def call_of(block: nn.Module, input: fx.Proxy, *args: Any, **kwargs: Any) -> Any:
    """The call of a block in a graph that is being traced (symbolic_trace, feature extractors).

    A tracer takes torch's own layers alone for leaves, and would else look into how a kernel is
    made. Raises ReparamError where the block is all that is traced, and no graph could call it.
    """
    tracer = input.tracer
    assert isinstance(tracer, fx.Tracer)
    if tracer.root is block:
        raise ReparamError(
            "torch.fx cannot trace a block by itself; trace the model around it, or call "
            "orepa.collapse(model) first"
        )
    return tracer.create_proxy(
        "call_module", tracer.path_of_module(block), (input, *args), dict(kwargs)
    )
