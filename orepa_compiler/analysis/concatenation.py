"""Norms behind a concatenation of convs, whose channels each come from one of them.

N(cat(y_1, ..., y_n)) = cat(N_1(y_1), ..., N_n(y_n)), N_i: the norm on the channels of y_i. So a
norm behind a mixed conv, or behind paths that are concatenated, is folded into each of the convs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from orepa_compiler.algebra.layers import is_batch_norm, is_plain_conv
from orepa_compiler.analysis.absorption import absorbs_norm
from orepa_compiler.analysis.crossing import called_alone, reaching
from orepa_compiler.analysis.regions import Interpreter
from orepa_compiler.blocks import LinearBlock
from orepa_compiler.blocks.own_forward import own_conv
from orepa_compiler.capture import Call

_CONCATENATIONS = {torch.cat, torch.concat}


def concatenated_convs(interpreter: Interpreter) -> Iterator[tuple[list[str], str]]:
    """The paths of convs that are concatenated, and of the norm that alone reads all of them."""
    capture = interpreter.capture
    for norm, calls in capture.calls.items():
        module = capture.module(norm)
        if not is_batch_norm(module) or capture.refusal(norm) is not None:
            continue
        (call,) = calls
        sources = call.node.all_input_nodes
        if len(sources) != 1:
            continue
        for found in reaching(capture, call.owner, sources[0], call.node):
            convs = _parts(interpreter, found)
            widths = [_width(capture.module(path)) for path in convs]
            if convs and sum(widths) == getattr(module, "num_features", None):
                yield convs, norm
                break


def _parts(interpreter: Interpreter, call: Call) -> list[str]:
    """The convs that a node concatenates along the channels; none where it does anything else."""
    node = call.node
    is_shown = call.owner not in interpreter.capture.recorded  # which shows chains of layers only
    if node.target not in _CONCATENATIONS or not is_shown or not _is_along_channels(node):
        return []
    parts = node.all_input_nodes
    if node.args[0] not in (parts, tuple(parts)):  # one twice, or what is no map
        return []
    found = [_conv(interpreter, call.owner, part, node) for part in parts]
    return [path for path in found if path] if all(found) else []


def _is_along_channels(node: fx.Node) -> bool:
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
    dim = given.pop("dim", 0)
    return list(given) == ["tensors"] and len(node.args) > 0 and isinstance(dim, int) and dim == 1


def _conv(interpreter: Interpreter, owner: str, part: fx.Node, user: fx.Node) -> str | None:
    """The path of the conv that gives a part, if it is joined with nothing before it."""
    for call in reaching(interpreter.capture, owner, part, user):
        path = called_alone(interpreter.capture, call)
        module = interpreter.capture.module(path) if path else None
        if module is not None and absorbs_norm(own_conv(module)):
            return path
        if module is not None and _is_conv(module):
            value = interpreter.values(call.owner).get(call.node)
            return path if value and value.layers == 1 and value.rest is None else None
    return None


def _is_conv(module: nn.Module) -> bool:
    return is_plain_conv(module) or isinstance(module, LinearBlock)


def _width(conv: nn.Module) -> int:
    return int(conv.out_channels)  # type: ignore[arg-type]
