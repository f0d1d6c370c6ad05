"""Checks what must hold for a block to stand in the place of a conv, whatever is asked for."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from orepa_compiler.algebra.classifiers import own_forward_reason
from orepa_compiler.algebra.overriding import answers_itself
from orepa_compiler.capture import Capture, ancestors
from orepa_compiler.capture.calls import PARAMETRIZED
from orepa_compiler.capture.skeleton import LAZY
from orepa_compiler.defaults.following import reads_pooled


def unsound_reason(capture: Capture, path: str, conv: nn.Module) -> str | None:
    """Why a block in the place of this conv could change what the model computes, or never run."""
    if any(isinstance(p, LAZY) for p in conv.parameters()):
        return "its shape is not known yet (lazy); run the model once first"
    if reason := made_weight_reason(conv):
        return reason
    if not isinstance(conv, _ConvNd) or "weight" not in conv._parameters:
        return no_conv_reason(conv)
    if answers_itself(conv):
        return (
            f"{type(conv).__name__} tells itself what its attributes are, which a block could not"
        )
    if "forward" in vars(conv):
        return "its forward was replaced on this one module, which a block could not call"
    if reason := capture.swap_refusal(path):
        return reason
    for owner in ancestors(path):
        if isinstance(around := capture.module(owner), _ConvNd):
            return f"it is a part of {owner or 'the model'}, which is a {type(around).__name__}"
    if path and not capture.calls.get(path) and not capture.unknown_calls(path):
        return "no forward calls it"
    return None


def made_weight_reason(conv: nn.Module) -> str | None:
    """Why a conv whose weight is made of other tensors must stay, or None where it is its own."""
    if parametrize.is_parametrized(conv):
        return PARAMETRIZED
    for hook in conv._forward_pre_hooks.values():  # weight_norm, spectral_norm, pruning
        if type(hook).__module__.startswith("torch.nn.utils."):
            return (
                f"its weight is made at each call by {type(hook).__name__}; make it a parameter "
                "again first (torch.nn.utils.remove_weight_norm, remove_spectral_norm, "
                "torch.nn.utils.prune.remove)"
            )
    return None


def no_conv_reason(layer: nn.Module) -> str:
    """Why no block can stand for a layer that is no conv with one kernel that is trained."""
    name = type(layer).__name__
    if isinstance(layer, _ConvNd) and isinstance(getattr(layer, "weight", None), torch.Tensor):
        return (
            "its weight is a tensor and no parameter, as remove_parametrizations leaves a frozen "
            "one; make it one: w = conv.weight; del conv.weight; conv.weight = nn.Parameter(w)"
        )
    return f"{name} is no conv of torch.nn with one kernel, so no block can stand for it"


def scripted_reason(capture: Capture, path: str, module: nn.Module) -> str | None:
    """Why nothing inside a scripted part is expanded, or None where it holds no kernel."""
    parent = capture.module(path.rpartition(".")[0])
    is_scripted = isinstance(module, torch.jit.ScriptModule)
    if not is_scripted or isinstance(parent, torch.jit.ScriptModule):
        return None
    has_kernel = any(p.dim() > 2 for p in module.parameters())
    return "put the nn.Module that it was scripted from in its place" if has_kernel else None


def takes_norm(capture: Capture, path: str) -> bool:
    """Whether a BatchNorm may be inserted behind this conv: a plain one, with one known call.

    Not where maps are one pixel: a batch of one image could not be trained on any more.
    """
    if reads_pooled(capture, path):
        return False
    calls = capture.calls.get(path, [])
    is_plain = own_forward_reason(capture.module(path)) is None
    return is_plain and (len(calls) == 1 or not path) and capture.unknown_calls(path) is None


def no_norms_reason(capture: Capture, path: str, conv: nn.Module) -> str | None:
    """Why no block with norms in its branches may stand here, or None."""
    if reads_pooled(capture, path):
        return (
            "its maps are one pixel, and of one image no norm can be taken there; give a block "
            "without norms, as by replace(block, scaling_layer='vector')"
        )
    online = "give a block without norms, as by replace(block, scaling_layer='vector')"
    if reason := own_forward_reason(conv):
        return f"{reason}, and branches that normalize run in its place; {online}"
    if not takes_norm(capture, path):
        reason = capture.unknown_calls(path) or "it is called several times"
        return f"{reason}, so the statistics of its branches would be mixed; {online}"
    return None
