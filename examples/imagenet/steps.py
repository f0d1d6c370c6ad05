"""One epoch of training, and one look at the validation images."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Place
from rich.progress import track
from settings import Settings
from torch import Tensor, nn

import orepa_compiler as orepa

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Training:
    """What steps: the model as it is called (wrapped, compiled), and what moves its weights."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler


def train_epoch(
    training: Training, batches: Iterable[Any], settings: Settings, place: Place
) -> Tensor:
    """(loss, top-1, top-5, count) summed over the images of all processes."""
    training.model.train()
    total = torch.zeros(4, dtype=torch.float64, device=place.device)
    for x, y in track(batches, "training", disable=not place.is_shown, transient=True):
        total += _step(training, place.images(x), place.labels(y), settings, place)
    return place.summed(total)


def _step(training: Training, x: Tensor, y: Tensor, settings: Settings, place: Place) -> Tensor:
    training.optimizer.zero_grad()
    total = torch.zeros(4, dtype=torch.float64, device=place.device)
    parts = list(zip(x.chunk(settings.accumulate), y.chunk(settings.accumulate), strict=True))
    whole = orepa.kernels_once(training.model) if settings.two_phase else nullcontext()
    with whole:
        for number, (images, labels) in enumerate(parts):
            is_last = settings.two_phase or number == len(parts) - 1
            with nullcontext() if is_last else place.no_sync(training.model):
                with autocast(settings, place):
                    outputs = training.model(images)
                    loss = F.cross_entropy(outputs, labels)
                training.scaler.scale(loss * len(labels) / len(y)).backward()
            total += counted(outputs, labels)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.schedule.step()
    return total


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Any], settings: Settings, place: Place) -> Tensor:
    """The same of the validation images. model: without its wrapper, for shares may differ."""
    model.eval()
    for buffer in model.buffers() if place.world > 1 else ():
        dist.broadcast(buffer, 0)  # each process has its own running statistics
    total = torch.zeros(4, dtype=torch.float64, device=place.device)
    for x, y in batches:
        with autocast(settings, place):
            total += counted(model(place.images(x)), place.labels(y))
    return place.summed(total)


def autocast(settings: Settings, place: Place) -> AbstractContextManager[Any]:
    if settings.amp == "none":
        return nullcontext()
    return torch.autocast(place.device.type, _TYPES[settings.amp])


@torch.no_grad()
def counted(outputs: Tensor, labels: Tensor) -> Tensor:
    """(loss, top-1, top-5, count) of a batch, summed."""
    loss = F.cross_entropy(outputs.float(), labels, reduction="sum")
    hits = outputs.topk(min(5, outputs.shape[1])).indices.eq(labels.unsqueeze(1))
    parts = (loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels)))
    return torch.stack([part.to(outputs.device, torch.float64) for part in parts])
