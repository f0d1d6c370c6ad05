"""Kernels once for several passes: gradient accumulation and two-phase steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from orepa_compiler.blocks import ReparamConv
from orepa_compiler.errors import ReparamError
from orepa_compiler.generation.store import KernelLeaf, sources
from orepa_compiler.reduction import reduce_gradients


@contextmanager
def kernels_once(model: nn.Module) -> Iterator[None]:
    """Within it, each block makes its kernel once, however many passes there are.

        optimizer.zero_grad()
        with orepa.kernels_once(model):
            for x, y in micro_batches:
                loss(model(x), y).backward()
        optimizer.step()

    Kernels are made on entry, as leaves. Backward passes add to dL/dW_e; on leaving, each block
    hands its sum on to its branches, once. That is the ordinary step up to rounding, since dL/dW_e
    enters the gradients linearly. Feature maps are gone by then, so it also lowers the peak of
    memory of a step with one pass (a two-phase step). Without gradients (evaluation) it saves the
    making of kernels alone.

    The blocks' gradients are there after the with block: unscale, clip and step then. A
    GradScaler's factor passes through. An error inside drops the kernels, and the gradients of all
    parameters are what they were on entry. DistributedDataParallel: give the wrapped model; on
    leaving, the gradients of the kernels and of all other parameters are averaged (so what crosses
    the wire is W_e, and not its branches), whatever hooks the wrapper has for communication.

    Raises ReparamError for a model without squeezed blocks, with sharded parameters (FSDP), or that
    is in a with block already; inside, when parameters of a block change or an optimizer steps.
    """
    blocks = _blocks(model)
    before = _gradients(model)
    hook = register_optimizer_step_pre_hook(_step_refusal(model))
    try:
        for path, block in blocks.items():
            block.store.leaf = KernelLeaf(block, path)
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            yield
        leaves = _checked(blocks)
        if isinstance(model, DistributedDataParallel):
            reduce_gradients(model, leaves, _others(model, blocks))
    except BaseException:
        for parameter, grad in before.items():
            parameter.grad = grad
        raise
    finally:
        hook.remove()
        for block in blocks.values():
            block.store.leaf = None
    for leaf in leaves:
        leaf.backward()


def _blocks(model: nn.Module) -> dict[str, ReparamConv]:
    """The squeezed blocks by path, all of them ready to keep a kernel."""
    blocks = {
        path: module for path, module in model.named_modules() if isinstance(module, ReparamConv)
    }
    if not blocks:
        raise ReparamError(
            f"{type(model).__name__} has no squeezed block, so there is no kernel to keep; "
            "give a model that orepa.expand made"
        )
    for path, block in blocks.items():
        if block.store.leaf is not None:
            raise ReparamError(
                "kernels_once keeps its kernel already; leave that with block first", path=path
            )
        for tensor in sources(block):
            if type(tensor) not in (Tensor, nn.Parameter):
                raise ReparamError(
                    f"its parameters are {type(tensor).__name__}s, perhaps sharded; kernels_once "
                    "needs whole ones: take an ordinary step",
                    path=path,
                )
    return blocks


def _gradients(model: nn.Module) -> dict[nn.Parameter, Tensor | None]:
    return {p: None if p.grad is None else p.grad.clone() for p in model.parameters()}


def _others(model: nn.Module, blocks: dict[str, ReparamConv]) -> list[nn.Parameter]:
    """The parameters that are trained and of which no kernel is made."""
    made = {id(tensor) for block in blocks.values() for tensor in sources(block)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in made]


def _checked(blocks: dict[str, ReparamConv]) -> list[KernelLeaf]:
    """The leaves, all of them up to date: nothing is handed on where one is not."""
    leaves = []
    for block in blocks.values():
        assert block.store.leaf is not None
        block.store.leaf.check(block)
        leaves.append(block.store.leaf)
    return leaves


def _step_refusal(model: nn.Module) -> Any:
    own = {id(parameter) for parameter in model.parameters()}

    def refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        if any(id(parameter) in own for group in groups for parameter in group["params"]):
            raise ReparamError(
                f"{type(optimizer).__name__}.step() inside kernels_once: the gradients of the "
                "blocks are there only after the with block; call it there"
            )

    return refuse
