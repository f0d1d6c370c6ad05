"""A bias that a conv has no place for, given to the BatchNorm that alone reads the conv.

N(y + b) = N'(y), mean' = mean - b
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.layers import is_batch_norm
from orepa_compiler.capture import Capture, ancestors


def norm_behind(capture: Capture, path: str) -> str | None:
    """The path of the norm with running statistics that a conv's one call goes into, and no other.

    None where there is no such norm, or where not all calls are known.
    """
    if not _is_called_once(capture, path):
        return None
    (call,) = capture.calls[path]
    consumers = list(capture.consumers(call))
    if len(consumers) != 1 or consumers[0] is None or consumers[0].node.op != "call_module":
        return None
    norm = capture.path_of(consumers[0])
    module = capture.module(norm)
    keeps = is_batch_norm(module) and isinstance(module.running_mean, Tensor)
    return norm if keeps and _is_called_once(capture, norm) else None


@torch.no_grad()
def give_bias(conv: nn.Module, norm: nn.Module) -> None:
    """Take the bias from a conv, in place, and move the norm behind it so that nothing changes."""
    assert isinstance(conv.bias, Tensor)
    assert isinstance(norm.running_mean, Tensor)
    norm.running_mean.sub_(conv.bias)
    conv.register_parameter("bias", None)


def _is_called_once(capture: Capture, path: str) -> bool:
    if capture.unknown_calls(path):
        return False
    owners = [owner for owner in ancestors(path) if owner in capture.graphs]
    called = [path, *filter(None, owners)]  # the root ("") is called by the user
    is_once = all(len(capture.calls.get(each, [])) == 1 for each in called)
    return is_once and not any(owner in capture.doubtful for owner in owners)
