"""What the processes of the distributed test run."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import orepa_compiler as orepa
from tests.quantization.nets import images, kernels, linear_blocks


def data_parallel(rank: int, once: bool) -> dict[str, Any]:
    """Two steps, each rank on its own images; the integers of the collapsed model."""
    model = orepa.fake_quantize(linear_blocks(), inputs=images())
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(2):
        wrapped.train()
        optimizer.zero_grad()
        batch = images(4, seed=10 * step + rank)
        if once:
            with orepa.kernels_once(wrapped):
                wrapped(batch).square().mean().backward()
        else:
            wrapped(batch).square().mean().backward()
        optimizer.step()
    wrapped.eval()(images())  # every process gets rank 0's ranges and statistics
    deploy = orepa.collapse(model)
    found = {path: integers.numpy() for path, integers in kernels(deploy).items()}
    return {**found, "output": deploy(images()).detach().numpy()}
