"""Makes the kernels of a model's blocks together at each forward, in any training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.generation import is_watched
from orepa_compiler.generation.store import Prepared, sources
from orepa_compiler.generation.together import made_together
from orepa_compiler.training.stepping import Squeezed, squeezed_blocks


class StepHooks:
    """What step_hooks registered. remove() takes it away; so does leaving it as a with block."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """From the next forward on each block makes its kernel by itself again."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> StepHooks:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def step_hooks(model: nn.Module) -> StepHooks:
    """Makes the kernels of all blocks together at each forward: few operations.

        hooks = orepa.step_hooks(model)     # once; the training loop stays as it is

    One line for a plain loop, Lightning, timm or accelerate. The kernels are part of the forward's
    own graph, so everything is as in an ordinary step: gradients are there after backward, for
    clipping, scaling, zero_grad and DistributedDataParallel (give either model). What it saves is
    launches, which is most on a GPU and for small kernels. Each forward makes them anew: for
    several micro-batches in one step `kernels_once` saves arithmetic too.

    A block that is run without the model's forward, that is recorded or transformed (torch.compile)
    or whose kernel is large, on a CPU, makes its own as ever. collapse needs no removal first.

    Raises ReparamError for a model without squeezed blocks, with sharded parameters (FSDP), or that
    has the hooks already.
    """
    squeezed_blocks(model)
    if any(hook is _prepare for hook in model._forward_pre_hooks.values()):
        raise ReparamError(
            f"{type(model).__name__} has step_hooks already; remove() those, or keep them"
        )
    first = model.register_forward_pre_hook(_prepare, prepend=True)
    return StepHooks([first, model.register_forward_hook(_close, always_call=True)])


def _prepare(model: nn.Module, args: Any) -> None:
    if is_watched():
        return
    blocks = list(_blocks(model))
    for block in blocks:
        block.store.prepared = None
    if not torch.is_grad_enabled():
        return
    free = [(block, sources(block)) for block in blocks if block.store.leaf is None]
    trained = [(block, tensors) for block, tensors in free if _is_trained_whole(tensors)]
    for number, made in made_together([block for block, _ in trained]).items():
        block, tensors = trained[number]
        if made.weight.requires_grad:
            block.store.prepared = Prepared(tensors, made)


def _close(model: nn.Module, args: Any, output: Any) -> None:
    if is_watched():
        return
    for block in _blocks(model):
        if block.store.prepared is not None:
            block.store.prepared.is_open = False


def _blocks(module: nn.Module) -> Iterator[Squeezed]:
    """The squeezed blocks, without a look at what is inside them."""
    if isinstance(module, Squeezed):
        yield module
        return
    for child in module._modules.values():
        if child is not None:
            yield from _blocks(child)


def _is_trained_whole(tensors: Sequence[Tensor]) -> bool:
    """Whether some are trained, and all are plain tensors, not shards."""
    is_whole = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    return is_whole and any(tensor.requires_grad for tensor in tensors)
