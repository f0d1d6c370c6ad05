"""Gives a bias that a conv has no place for to the BatchNorm that alone reads the conv.

N(y + b) = N'(y), mean' = mean - b
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.algebra.layers import linear_part
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import Capture, ancestors
from orepa_compiler.errors import NotLinear, ReparamError


def bias_taker(capture: Capture, path: str, block: ConvBlock) -> str:
    """The norm that can take the bias which a block makes and its conv had no place for.

    Raises ReparamError where there is none.
    """
    try:
        return norm_behind(capture, path)
    except NotLinear as error:
        whose = (
            "its inserted norm needs"
            if block.norm is not None
            else "the norms of its branches need"
        )
        raise ReparamError(
            f"{whose} a bias to go to, the original conv has none, and {error.reason}; "
            "use fold_norm=True",
            path=path,
        ) from error


def norm_behind(capture: Capture, path: str) -> str:
    """The path of the norm with running statistics that a conv's one call goes into, and no other.

    Raises NotLinear where there is no such norm, where not all calls are known, and where what the
    conv gives is seen on its way: it changes by the bias.
    """
    norm = _only_reader(capture, path)
    if norm is None or not _keeps_mean(capture.module(norm)):
        raise NotLinear("no BatchNorm is known to be all that reads it")
    linear_part(capture.module(norm))
    if reason := _seen_between(capture, path, norm):
        raise NotLinear(reason)
    return norm


def _keeps_mean(module: nn.Module) -> bool:
    return is_batch_norm(module) and isinstance(module.running_mean, Tensor)


def _only_reader(capture: Capture, path: str) -> str | None:
    """The path of the module that alone is called on what a conv gives, once, or None."""
    if not _is_called_once(capture, path):
        return None
    (call,) = capture.calls[path]
    consumers = list(capture.consumers(call))
    if len(consumers) != 1 or consumers[0] is None or consumers[0].node.op != "call_module":
        return None
    reader = capture.path_of(consumers[0])
    return reader if _is_called_once(capture, reader) else None


def _seen_between(capture: Capture, conv: str, norm: str) -> str | None:
    """Why the norm behind a conv may not change, or what is between them: it has a hook, say."""
    if reason := capture.kept.get(norm) or capture.hook_refusal(norm):
        return f"{norm}, the norm that reads it, stays: {reason}"
    if readers := capture.reads.get(norm):
        return f"{norm}, the norm that reads it, is read by {readers[0] or 'the model'} too"
    around = {*ancestors(conv)} ^ {*ancestors(norm)}
    for path in sorted(around & capture.graphs.keys()):
        if reason := capture.hook_refusal(path):
            return f"{path}, between it and the norm {norm}, stays: {reason}"
    return None


@torch.no_grad()
def give_bias(conv: nn.Module, norm: nn.Module) -> None:
    """Takes the bias from a conv, and move the norm behind it so that nothing changes.

    The norm's mean is a new tensor: the old one stays as it was.
    """
    assert isinstance(conv.bias, Tensor)
    assert isinstance(norm.running_mean, Tensor)
    norm.running_mean = norm.running_mean - conv.bias.to(norm.running_mean)
    conv.register_parameter("bias", None)


def _is_called_once(capture: Capture, path: str) -> bool:
    if capture.unknown_calls(path):
        return False
    owners = [owner for owner in ancestors(path) if owner in capture.graphs]
    called = [path, *filter(None, owners)]  # the root ("") is called by the user
    is_once = all(len(capture.calls.get(each, [])) == 1 for each in called)
    return is_once and not any(owner in capture.doubtful for owner in owners)
