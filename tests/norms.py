"""Norm layers as training leaves them: with fresh ones, a forgotten mean or bias does not show."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same model, with random statistics and affine parameters in every norm layer.

    A norm layer is one with running statistics, or one whose weight has the shape of its bias:
    BatchNorm, LayerNorm, GroupNorm and timm's versions of them. running_var and weight lie in
    (0.5, 1.5), running_mean and bias in (-0.5, 0.5), so that activations neither die nor explode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            own = {
                **dict(module.named_parameters(recurse=False)),
                **dict(module.named_buffers(recurse=False)),
            }
            if _is_norm(own):
                for name, low in (
                    ("running_mean", -0.5),
                    ("running_var", 0.5),
                    ("weight", 0.5),
                    ("bias", -0.5),
                ):
                    if name in own:
                        values = torch.rand(own[name].shape, generator=generator)
                        own[name].copy_(low + values)
    return model


def _is_norm(tensors: dict[str, Tensor]) -> bool:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    is_affine = weight is not None and bias is not None and weight.shape == bias.shape
    return "running_mean" in tensors or is_affine
