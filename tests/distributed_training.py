"""What the processes of the distributed tests run, and one process doing the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import orepa_compiler as orepa
from orepa_compiler import generation
from orepa_compiler.blocks import ConvBlock
from tests.training_nets import expanded_net, loss, optimizer_of, stock_net

STEPS = 3
MICRO_BATCHES = 2


def shard(step: int, rank: int) -> list[Tensor]:
    """The micro-batches of one process in one step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    shape = (2, 3, 12, 12)
    double = torch.float64
    return [torch.randn(shape, generator=generator, dtype=double) for _ in range(MICRO_BATCHES)]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything in the state_dict, whole and as NumPy, which a pipe carries."""
    return numpy_of(model.state_dict())


def numpy_of(state: dict[str, Any]) -> dict[str, Any]:
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}
    return {name: tensor.cpu().numpy() for name, tensor in whole.items()}


def single_process(count: int, steps: int = STEPS) -> dict[str, Any]:
    """The same steps in one process: each shard goes through the norms alone, as on its rank."""
    model = expanded_net()
    optimizer = optimizer_of(model)
    for step in range(steps):
        for rank in range(count):
            for x in shard(step, rank):
                (loss(model, x) / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model)


def data_parallel(rank: int, way: str) -> dict[str, Any]:
    """Steps under DistributedDataParallel: the state, the collapsed state, and what was sent."""
    model = DistributedDataParallel(
        expanded_net(), gradient_as_bucket_view=way == "no_sync, bucket views"
    )
    wrapped = torch.compile(model, backend="eager") if way == "kernels_once, compiled" else model
    if way == "step_hooks":
        generation.ALIKE = 1  # of this process: blocks that are all different go together too
        orepa.step_hooks(model)
    optimizer = optimizer_of(model)
    with counting(model) as sent:
        for step in range(STEPS):
            data_parallel_step(model, wrapped, way, shard(step, rank))
            optimizer.step()
            optimizer.zero_grad()
    statistics = state_of(model.module)
    with torch.no_grad():
        model.eval()(shard(0, rank)[0])  # a validation pass: every process gets rank 0's statistics
    return {
        "state": state_of(model.module),
        "statistics": statistics,
        "collapsed": state_of(orepa.collapse(model.module)),
        "sent": sent,
    }


def data_parallel_step(model: Any, wrapped: Any, way: str, batches: list[Tensor]) -> None:
    if way.startswith("kernels_once"):
        with orepa.kernels_once(wrapped):
            for x in batches:
                loss(wrapped, x).backward()
        return
    for index, x in enumerate(batches):
        with model.no_sync() if index < len(batches) - 1 else nullcontext():
            loss(wrapped, x).backward()


@contextmanager
def counting(model: DistributedDataParallel) -> Iterator[list[int]]:
    """The bytes of each all-reduce of gradients: the wrapper's buckets, and kernels_once's own."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def count(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **options)

    def bucket(state, bucket):  # type: ignore[no-untyped-def]  # torch reads the annotations
        buffer = bucket.buffer()
        sent.append(buffer.numel() * buffer.element_size())
        all_reduce(buffer.div_(dist.get_world_size()))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    model.register_comm_hook(None, bucket)
    with mock.patch.object(dist, "all_reduce", count):
        yield sent


def partly_reached(rank: int) -> list[float]:
    """kernels_once where gradients were there, and where one process skips all layers but one."""
    ordinary, net = (DistributedDataParallel(expanded_net()) for _ in range(2))
    for model in (ordinary, net):
        model.module[-1].bias.grad = torch.ones(5).double()
        data_parallel_step(model, model, "no_sync" if model is ordinary else "kernels_once",
                           shard(0, rank))  # fmt: skip
    for ours, theirs in zip(net.parameters(), ordinary.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    with orepa.kernels_once(net):
        net.zero_grad()
        layers = net.module if rank else net.module[-1:]
        layers(shard(0, 0)[0] if rank else torch.ones(2, 144).double()).sum().backward()
    return [float("nan") if p.grad is None else p.grad.sum().item() for p in net.parameters()]


def ignored(rank: int) -> tuple[Any, Any]:
    """The gradients of a bias that the wrapper is told to leave alone, and of the weight beside."""
    net = expanded_net()
    name = list(dict(net.named_parameters()))[-1]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, [name])
    with orepa.kernels_once(model := DistributedDataParallel(net)):
        loss(model, shard(0, rank)[0]).backward()
    alone, weight = net.get_parameter(name), net.get_parameter(name.replace("bias", "weight"))
    assert alone.grad is not None
    assert weight.grad is not None
    return alone.grad.numpy(), weight.grad.numpy()


def sharded_net() -> nn.Module:
    model = expanded_net()
    for block in model.modules():
        if isinstance(block, ConvBlock):
            fully_shard(block)
    return fully_shard(model)


def sharded(rank: int, folder: Path) -> dict[str, Any]:
    """Steps under fully_shard; a fresh model goes on from a checkpoint after the first."""
    model = sharded_net()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        sharded_step(model, optimizer, shard(step, rank))
        if step == 0:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(state, checkpoint_id=folder / "dcp")
    again = sharded_net()
    optimizer = optimizer_of(again)
    state = dict(zip(("model", "optimizer"), get_state_dict(again, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(
        again, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    for step in range(1, STEPS):
        sharded_step(again, optimizer, shard(step, rank))
    orepa.save(again, folder / "orepa.safetensors")
    refusals = [refusal_of(lambda: orepa.kernels_once(model).__enter__())]
    refusals.append(refusal_of(lambda: orepa.collapse(model)))
    return {"state": state_of(model), "again": state_of(again), "refusals": refusals}


def sharded_step(model: Any, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for index, x in enumerate(batches):
        model.set_requires_gradient_sync(index == len(batches) - 1)
        loss(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()


def refusal_of(call: Any) -> str:
    try:
        call()
    except orepa.ReparamError as error:
        return str(error)
    return "no error"


def resumable(rank: int, folder: Path, dies_in: int | None) -> dict[str, Any]:
    """Epochs of steps from the last checkpoint on; rank 1 is killed in the middle of one."""
    file, extra = folder / "model.safetensors", folder / "extra.pt"
    net = orepa.load(stock_net(), file) if file.exists() else expanded_net()
    model = DistributedDataParallel(net.train())
    optimizer, start = optimizer_of(model), 0
    if extra.exists():
        loaded = torch.load(extra, weights_only=True)
        optimizer.load_state_dict(loaded["optimizer"])
        start = loaded["epoch"] + 1
    for epoch in range(start, 3):
        for step in range(2):
            if (epoch, step, rank) == (dies_in, 1, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            with orepa.kernels_once(model):
                for x in shard(10 * epoch + step, rank):
                    loss(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0:
            orepa.save(net, file)
            torch.save({"optimizer": optimizer.state_dict(), "epoch": epoch}, extra)
        dist.barrier()
    return {"state": state_of(net), "start": start}
