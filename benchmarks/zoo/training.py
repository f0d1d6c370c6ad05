"""One step of training, whatever a model returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from benchmarks.zoo import detection
from benchmarks.zoo.inputs import Instance
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.verification.nesting import tensors_in

# The length of the step, relative to that of all weights: small steps add up over the layers.
_STEP = 1e-4


class NotFinite(Exception):
    """A step after which there is nothing to compare."""


def train_step(model: nn.Module, instance: Instance, dtype: torch.dtype) -> int:
    """One step of SGD whose length is a ten-thousandth of the weights'; blocks without a gradient.

    Raises NotFinite where a gradient is not finite.
    """
    torch.manual_seed(0)
    model.train()
    inputs = instance.inputs(dtype)
    if detection.is_detector(model):
        inputs = (*inputs, detection.targets(model, instance.size, dtype))
    loss = _loss(model(*inputs))
    loss.backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    slopes, weights = (
        torch.stack([vector_norm(t, dtype=torch.float64) for t in tensors]).norm()
        for tensors in (
            [p.grad for p in trained if p.grad is not None],
            [p.detach() for p in trained],
        )
    )
    if not slopes.isfinite():
        raise NotFinite("the gradients are not finite")
    rate = _STEP * float(weights) / max(float(slopes), 1e-30)
    torch.optim.SGD(trained, lr=rate, foreach=False).step()
    idle = sum(
        all(p.grad is None for p in module.parameters())
        for module in model.modules()
        if isinstance(module, ConvBlock)
    )
    model.zero_grad(set_to_none=True)
    model.eval()
    return idle


def _loss(outputs: Any) -> Tensor:
    """The mean square of every output that the weights reach; a detector's own losses."""
    reached = [t for t in tensors_in(outputs) if t.requires_grad and t.is_floating_point()]
    if not reached:
        raise NotFinite("no output in train mode has a gradient")
    return torch.stack([t.square().mean() for t in reached]).sum()
