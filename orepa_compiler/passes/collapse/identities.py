"""Puts torch's Identity where a norm was folded, and lets it answer as the norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.classifiers import is_norm


def identity_for(norm: nn.Module) -> nn.Identity:
    """An Identity in a layer's place; in a norm's, with the statistics of one that does nothing.

    For models whose classes bring a fuse() of their own: it looks for `bn.running_var` and the
    like, and trainers call it. It then multiplies by 1 and adds 0. The tensors are buffers, so that
    they move with the model, and in no state_dict.
    """
    identity = nn.Identity()
    mean = getattr(norm, "running_mean", None)
    if not is_norm(norm) or not isinstance(mean, Tensor):
        return identity
    ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)
    for name, value in {"weight": ones, "bias": zeros, "running_mean": zeros.clone()}.items():
        identity.register_buffer(name, value, persistent=False)
    identity.register_buffer("running_var", ones.clone(), persistent=False)
    identity.eps, identity.num_features = 0.0, mean.numel()  # type: ignore[assignment]
    return identity.train(norm.training)
