"""Makes kernels once for several passes: gradient accumulation and two-phase steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import ReparamConv, SqueezedSum
from orepa_compiler.errors import ReparamError
from orepa_compiler.generation.graphs import generate_replayed
from orepa_compiler.generation.store import KernelLeaf, sources
from orepa_compiler.generation.together import generate_together
from orepa_compiler.generation.whole import generate_all
from orepa_compiler.training.gradient_watch import GradientWatch
from orepa_compiler.training.reduction import reduce_gradients, unreduced, wrappers_in

# What runs as one conv with a kernel made at each step.
Squeezed = ReparamConv | SqueezedSum


@contextmanager
def kernels_once(
    model: nn.Module, *, compiled: bool | str = False, graphs: bool = False
) -> Iterator[None]:
    """Lets each block make its kernel once, however many passes there are within it.

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

    compiled: make the kernels of all blocks, and their gradients, in one function of torch.compile.
    It is meant for a GPU, where many small launches cost more than the arithmetic; the first step
    then waits for the compiler. A text is torch.compile's mode, such as "reduce-overhead".

    graphs: record the making of all kernels, and of all their gradients, as two CUDA graphs and run
    them again at each step: two launches. Recorded anew where parameters have moved in memory. They
    hold memory for the kernels and all gradients of the blocks once more.

    Raises ReparamError for a model without squeezed blocks, with sharded parameters (FSDP), or that
    is in a with block already; inside, when parameters of a block change, an optimizer steps, or
    their gradients are asked for by name (autograd.grad, backward(inputs=...)), and on leaving,
    where gradients were cleared or changed after a backward pass. A backward pass that comes after
    the with block raises it too.
    """
    blocks = squeezed_blocks(model)
    before = _gradients(model)
    hook, watch = register_optimizer_step_pre_hook(_step_refusal(model)), None
    try:
        made = _generated(model, blocks, compiled=compiled, graphs=graphs)
        for (path, block), operator in zip(blocks.items(), made, strict=True):
            block.store.leaf = KernelLeaf(block, path, operator)
        watch = _watch(model, blocks)
        with unreduced(wrappers_in(model)):
            yield
        leaves = _checked(blocks)
        watch.check()
        for wrapper in wrappers_in(model):
            inside = set(wrapper.modules())
            own = {path: block for path, block in blocks.items() if block in inside}
            reduce_gradients(wrapper, _checked(own), _others(wrapper, own))
    except BaseException:
        for parameter, grad in before.items():
            parameter.grad = grad
        raise
    finally:
        hook.remove()
        if watch is not None:
            watch.close()
        for block in blocks.values():
            if block.store.leaf is not None:
                block.store.leaf.close()
            block.store.leaf = None
    pairs = [pair for leaf in leaves for pair in leaf.gathered()]
    if pairs:
        torch.autograd.backward([kernel for kernel, _ in pairs], [grad for _, grad in pairs])


def _generated(
    model: nn.Module, blocks: dict[str, Squeezed], *, compiled: bool | str, graphs: bool
) -> list[ConvOperator]:
    if compiled and graphs:
        raise ReparamError("kernels_once takes compiled= or graphs=, not both")
    if compiled:
        mode = compiled if isinstance(compiled, str) else None
        return generate_all(model, list(blocks.values()), mode=mode)
    if graphs:
        return generate_replayed(model, list(blocks.values()))
    return generate_together(list(blocks.values()))


def squeezed_blocks(model: nn.Module) -> dict[str, Squeezed]:
    """The squeezed blocks by path, all of them ready to keep a kernel."""
    blocks = {
        path: module for path, module in model.named_modules() if isinstance(module, Squeezed)
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


def _watch(model: nn.Module, blocks: dict[str, Squeezed]) -> GradientWatch:
    """Of the parameters of which no kernel is made: theirs gather where all can reach them."""
    others = {id(parameter) for parameter in _others(model, blocks)}
    named = [(name, p) for name, p in model.named_parameters() if id(p) in others]
    leaves = [block.store.leaf for block in blocks.values() if block.store.leaf is not None]
    return GradientWatch(named, [tensor for leaf in leaves for tensor in leaf.leaves()])


def _gradients(model: nn.Module) -> dict[nn.Parameter, Tensor | None]:
    return {p: None if p.grad is None else p.grad.clone() for p in model.parameters()}


def _others(model: nn.Module, blocks: dict[str, Squeezed]) -> list[nn.Parameter]:
    """The parameters that are trained and of which no kernel is made."""
    made = {id(tensor) for block in blocks.values() for tensor in sources(block)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in made]


def _checked(blocks: dict[str, Squeezed]) -> list[KernelLeaf]:
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
