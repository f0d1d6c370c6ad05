"""Where a process stands among the others: torchrun's rank, or alone."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Place:
    """A process: its rank of `world`, and its device."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> Place:
        """As torchrun says; without torchrun, one process."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(int(os.environ.get("RANK", 0)), world, device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_shown(self) -> bool:
        return self.is_first and sys.stderr.isatty()

    def images(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True, memory_format=torch.channels_last)

    def labels(self, y: Tensor) -> Tensor:
        return y.to(self.device, non_blocking=True)

    def summed(self, total: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def wrapped(self, model: nn.Module) -> nn.Module:
        if self.world == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """For all micro-batches of a step but the last. A compiled model forwards the name."""
        return model.no_sync() if self.world > 1 else nullcontext()  # type: ignore[operator]

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()
