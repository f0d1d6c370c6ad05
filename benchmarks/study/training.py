"""One run: a net is trained, collapsed, and the collapsed net is measured."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from benchmarks.study.arms import ARMS
from benchmarks.study.data import FLIPPED, flipped, shifted, split
from benchmarks.study.nets import NETS
from benchmarks.study.runs import Run
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.training.branch_history import branch_snapshots

MOMENTUM = 0.9
SHIFT = 2  # pixels of augmentation for 28, one for 8
_EVALUATED = 500  # images at a time


def train(run: Run) -> dict[str, Any]:
    """What a run came to: accuracy in per cent of the collapsed net, the loss of its last epoch.

    similarity: the mean |cosine| of two branches of a block, where the net has blocks. fit_seconds:
    of the processor, in the training alone.
    """
    begin = time.perf_counter()
    parts = split(run.data, train=run.train, seed=run.seed, held=run.held)
    net = make_net(run, parts.train[0][: run.batch])
    before = time.process_time()
    loss = _fit(run, net, *parts.train)
    fit_seconds = time.process_time() - before
    accuracy = _accuracy(orepa.collapse(net.eval()), *getattr(parts, run.held))
    return {
        "accuracy": round(accuracy, 4),
        "loss": round(loss, 6) if math.isfinite(loss) else None,
        "similarity": _similarity(net),
        "seconds": round(time.perf_counter() - begin, 2),
        "fit_seconds": round(fit_seconds, 2),
        "torch": torch.__version__,
    }


def make_net(run: Run, images: Tensor) -> nn.Module:
    """The net of a run, before training: the same plain weights for all arms of a seed."""
    torch.manual_seed(run.seed)
    net = NETS[run.net](images.shape[-1], run.width)
    return ARMS[run.arm].form(net, images).train()


def _fit(run: Run, net: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Trains in place with a cosine; gives the mean loss of the last epoch."""
    optimizer = _optimizer(run, net)
    steps = run.epochs * (len(images) // run.batch)
    warm = run.warmup * (len(images) // run.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: _rate(n, warm, steps))
    generator = torch.Generator().manual_seed(run.seed)
    losses: list[float] = []
    for _ in range(run.epochs):
        losses = []
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(run.batch):
            if len(chosen) < run.batch:
                continue
            batch = shifted(images[chosen], generator, SHIFT if images.shape[-1] > 16 else 1)
            if run.data in FLIPPED:
                batch = flipped(batch, generator)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch), classes[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def _optimizer(run: Run, net: nn.Module) -> torch.optim.Optimizer:
    groups = _groups(net, run.weight_decay, scaling_decays=run.scaling_decays)
    if run.optimizer == "AdamW":
        return torch.optim.AdamW(groups, lr=run.rate, foreach=True)
    return torch.optim.SGD(groups, lr=run.rate, momentum=MOMENTUM, foreach=True)


def _groups(net: nn.Module, decay: float, *, scaling_decays: bool) -> list[dict[str, Any]]:
    groups = orepa.param_groups(net, weight_decay=decay)
    if not scaling_decays:
        return groups
    blocks = [m for m in net.modules() if isinstance(m, ConvBlock) and m.scaling is not None]
    scaling = [block.scaling for block in blocks]
    known = {id(parameter) for parameter in scaling}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in known]
    return [*groups, {"params": scaling, "weight_decay": decay, "name": "scaling"}]


def _rate(step: int, warm: int, steps: int) -> float:
    """The part of the learning rate at a step: linear up, then half a cosine down."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def _accuracy(net: nn.Module, images: Tensor, classes: Tensor) -> float:
    guesses = torch.cat([net(part).argmax(1) for part in images.split(_EVALUATED)])
    return 100 * (guesses == classes).double().mean().item()


def _similarity(net: nn.Module) -> float | None:
    """The mean |cosine| over all pairs of branches that are not zero, over all blocks."""
    if not any(isinstance(module, ConvBlock) for module in net.modules()):
        return None
    cosines = [
        abs(block.similarity[i][j])
        for block in branch_snapshots(net)
        for i in range(len(block.branches))
        for j in range(i)
        if block.norms[i] > 0 and block.norms[j] > 0
    ]
    return round(sum(cosines) / len(cosines), 5) if cosines else None
