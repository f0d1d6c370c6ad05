"""Gradients averaged over the processes of DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orepa_compiler.generation.store import KernelLeaf


def wrappers_in(model: nn.Module) -> list[DistributedDataParallel]:
    """The wrappers of a model: itself, or those inside (what torch.compile was given)."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


@contextmanager
def unreduced(wrappers: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside, no wrapper reduces the gradients of a backward pass."""
    try:
        with ExitStack() as stack:
            for wrapper in wrappers:
                stack.enter_context(wrapper.no_sync())
            yield
    finally:
        for wrapper in wrappers:
            # no_sync puts off the broadcast of running statistics too, until after a pass that
            # reduces, and here none does
            wrapper.require_forward_param_sync = True


def reduce_gradients(
    model: DistributedDataParallel, leaves: Sequence[KernelLeaf], others: Sequence[nn.Parameter]
) -> None:
    """Average the gradients of kernels and of the other parameters, in place.

    One that some process did not reach counts as zero there; one that none reached stays None.
    """
    ignored = {id(p) for n, p in model.module.named_parameters() if n in model.parameters_to_ignore}
    tensors: list[Tensor] = [t for leaf in leaves for t in leaf.leaves()]
    tensors += [p for p in others if id(p) not in ignored]
    if not tensors:
        return
    group = model.process_group
    reached = torch.tensor([float(t.grad is not None) for t in tensors], device=tensors[0].device)
    dist.all_reduce(reached, op=dist.ReduceOp.MAX, group=group)
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor, is_reached in zip(tensors, reached.tolist(), strict=True):
        if is_reached:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor.grad)
    for gradients in alike.values():
        # one after the other in the order of indices: layouts in memory may differ by process
        flat = torch.cat([grad.flatten() for grad in gradients]).div_(dist.get_world_size(group))
        dist.all_reduce(flat, group=group)
        for grad, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            grad.copy_(mean.view_as(grad))
