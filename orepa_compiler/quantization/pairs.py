"""Pairs of layers between which a factor for each channel may move: a net has many equal forms.

    W_2 f(W_1 x + b_1) = (W_2 diag(s)) f(diag(1/s) (W_1 x + b_1)),    s > 0

f: ReLU and its like, pooling, or nothing: f(t y) = t f(y), t > 0.   (Nagel et al. 2019, Sec. 4.1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from orepa_compiler.algebra.classifiers import CONVS, is_idle
from orepa_compiler.algebra.overriding import has_torch_forward
from orepa_compiler.capture import Call, Capture, ancestors

_HOMOGENEOUS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_FUNCTIONS: tuple[Callable[..., Any], ...] = (torch.relu, F.relu, F.leaky_relu)


@dataclass(frozen=True)
class Pair:
    """A layer whose whole output goes, through what scales with its input, into another one."""

    first: str
    second: str


def pairs(capture: Capture) -> Iterator[Pair]:
    """The pairs of a model without blocks, in the order of its modules."""
    for path, layer in capture.skeleton.named_modules():
        if not (_is_plain(layer) and _runs_once(capture, path)):
            continue
        second = _reader(capture, capture.calls[path][0])
        if second is not None and _fits(layer, capture.module(second)):
            yield Pair(path, second)


def _reader(capture: Capture, call: Call) -> str | None:
    """The layer that alone reads a value, behind what scales with its input."""
    while True:
        readers = list(capture.consumers(call))
        if len(readers) != 1 or readers[0] is None:
            return None
        call = readers[0]
        node = call.node
        if node.op == "call_module":
            path = capture.path_of(call)
            module = capture.module(path)
            if not _runs_once(capture, path):
                return None
            if _is_plain(module):
                return path
            scales = isinstance(module, _HOMOGENEOUS) and has_torch_forward(module)
            if not scales and not is_idle(module):
                return None
        elif not (
            (node.op == "call_function" and node.target in _FUNCTIONS)
            or (node.op == "call_method" and node.target in ("relu", "relu_"))
        ):
            return None


def _runs_once(capture: Capture, path: str) -> bool:
    """Whether one call of it is known, no hook looks on, and nobody else reads its parameters."""
    if capture.unknown_calls(path) or capture.swap_refusal(path):
        return False
    owners = [owner for owner in ancestors(path) if owner in capture.graphs]
    called = [path, *filter(None, owners)]
    is_once = all(len(capture.calls.get(each, [])) == 1 for each in called)
    return is_once and not any(owner in capture.doubtful for owner in owners)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) in (*CONVS, nn.Linear) and has_torch_forward(layer)


def _fits(first: nn.Module, second: nn.Module) -> bool:
    """Whether one gives the channels that the other reads; both of one kind, as Conv2d."""
    return type(first) is type(second) and _width(first, "out") == _width(second, "in")


def _width(layer: nn.Module, side: str) -> int:
    kind = "features" if isinstance(layer, nn.Linear) else "channels"
    return int(getattr(layer, f"{side}_{kind}"))
