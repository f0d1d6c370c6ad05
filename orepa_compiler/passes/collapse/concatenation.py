"""Folds norms behind a concatenation of convs, whose channels each come from one of them.

N(cat(y_1, ..., y_n)) = cat(N_1(y_1), ..., N_n(y_n)), N_i: the norm on the channels of y_i. So a
norm behind a mixed conv, or behind paths that are concatenated, is folded into each of the convs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from orepa_compiler.algebra.classifiers import is_batch_norm, is_plain_conv
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.own_forward import own_conv
from orepa_compiler.capture import Call, Capture
from orepa_compiler.passes.collapse.absorption import absorbs_norm
from orepa_compiler.passes.collapse.norms_behind import called_alone, reaching

_CONCATENATIONS = {torch.cat, torch.concat}


def concatenated_convs(capture: Capture) -> Iterator[tuple[list[str], str]]:
    """The paths of convs that are concatenated, and of the norm that alone reads all of them."""
    for norm, calls in capture.calls.items():
        module = capture.module(norm)
        if not is_batch_norm(module) or capture.refusal(norm) is not None:
            continue
        (call,) = calls
        sources = call.node.all_input_nodes
        if len(sources) != 1:
            continue
        for found in reaching(capture, call.owner, sources[0], call.node):
            convs = _parts(capture, found)
            widths = [_width(capture.module(path)) for path in convs]
            if convs and sum(widths) == getattr(module, "num_features", None):
                yield convs, norm
                break


def _parts(capture: Capture, call: Call) -> list[str]:
    """The convs that a node concatenates along the channels; none where it does anything else."""
    node = call.node
    is_shown = call.owner not in capture.recorded  # which shows chains of layers only
    if node.target not in _CONCATENATIONS or not is_shown or not _is_along_channels(node):
        return []
    parts = node.all_input_nodes
    if node.args[0] not in (parts, tuple(parts)):  # one twice, or what is no map
        return []
    found = [_conv(capture, call.owner, part, node) for part in parts]
    return [path for path in found if path] if all(found) else []


def _is_along_channels(node: fx.Node) -> bool:
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
    dim = given.pop("dim", 0)
    return list(given) == ["tensors"] and len(node.args) > 0 and isinstance(dim, int) and dim == 1


def _conv(capture: Capture, owner: str, part: fx.Node, user: fx.Node) -> str | None:
    """The path of the conv or block that gives a part."""
    for call in reaching(capture, owner, part, user):
        path = called_alone(capture, call)
        if path and _takes_norm(capture.module(path)):
            return path
    return None


def _takes_norm(module: nn.Module) -> bool:
    is_known = is_plain_conv(module) or isinstance(module, ConvBlock)
    return is_known or absorbs_norm(own_conv(module))


def _width(conv: nn.Module) -> int:
    return int(conv.out_channels)  # type: ignore[arg-type]
