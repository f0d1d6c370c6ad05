"""What stands before and behind a conv: the dataflow that decides whether a block fits there.

It only chooses defaults. Whether a rewrite is exact never depends on what is found here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

from orepa_compiler.algebra.layers import is_activation, is_conv_like, is_dropout, is_norm
from orepa_compiler.capture import Call, Capture
from orepa_compiler.capture.proxies import IN_PLACE_OPERATORS

NORM, ACTIVATION, NOTHING = "norm", "activation", "nothing reads its output"
PASSED, GATE = "passed", "followed by the gate"

# A gate closes a side path; an activation on the main path is any other.
_GATES = ("Sigmoid", "Hardsigmoid", "HardSigmoid", "Softmax", "Tanh", "LogSigmoid")
_NORM_NAMES = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_ACTIVATION_NAMES = (
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "hardswish",
    "mish", "prelu", "rrelu", "softplus", "threshold", "hardtanh",
)  # fmt: skip
# Layers that keep channels apart: a norm behind them still normalizes the conv's channels.
_PASSED_MODULES = (
    nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AvgPool3d, nn.ZeroPad2d,
)  # fmt: skip
_PASSED_NAMES = (
    "permute", "transpose", "contiguous", "cat", "concat", "dropout", "max_pool2d", "avg_pool2d",
    "max_pool1d", "avg_pool1d", "max_pool3d", "avg_pool3d", "pad", "getitem",
)  # fmt: skip
_SHAPE_READS = ("getattr", "size", "dim", "numel")
_POOLS = ("AdaptiveAvgPool", "AdaptiveMaxPool", "SelectAdaptivePool", "GlobalAvgPool")


def followed_by(capture: Capture, path: str) -> str:
    """What reads a conv's output: NORM, ACTIVATION, or in words what does."""
    calls = capture.calls.get(path, [])
    kinds = {kind for call in calls for kind in _kinds(capture, call, depth=0)}
    if len(kinds) == 1:
        return kinds.pop()
    if not path:
        return "its output is the model's"
    if not kinds:
        return NOTHING
    return f"several consumers: {', '.join(sorted(kinds))}"


def reads_pooled(capture: Capture, path: str) -> bool:
    """Whether the conv works on maps that were pooled to one pixel (squeeze-and-excitation)."""
    calls = capture.calls.get(path, [])
    rank = len(getattr(capture.module(path), "kernel_size", ()))
    return bool(calls) and all(_is_pooled(capture, call, rank) for call in calls)


def _kinds(capture: Capture, call: Call, depth: int) -> Iterator[str]:
    for consumer in capture.consumers(call):
        if consumer is None:
            yield "its output is the model's"
            continue
        kind = kind_of(capture, consumer)
        if kind == PASSED and depth < 16:
            yield from _kinds(capture, consumer, depth + 1)
        elif kind:
            yield kind


def kind_of(capture: Capture, consumer: Call) -> str | None:
    """NORM, ACTIVATION, PASSED to look behind it, None to ignore it, or a description."""
    node = consumer.node
    if node.op == "call_module":
        return _module_kind(capture.module(capture.path_of(consumer)))
    if node.op == "output":
        return "it is returned as one of several values"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _SHAPE_READS:
        return None
    for kind, names in ((NORM, _NORM_NAMES), (ACTIVATION, _ACTIVATION_NAMES)):
        if name in names:
            return kind
    if node.target in IN_PLACE_OPERATORS:
        name = name[1:]
    return PASSED if name in _PASSED_NAMES else f"followed by {name.strip('_')}"


def _module_kind(module: nn.Module) -> str:
    name = type(module).__name__
    if is_norm(module):
        return NORM
    if isinstance(module, _PASSED_MODULES) or is_dropout(module) or name == "Permute":
        return PASSED
    if name in _GATES:
        return f"{GATE} {name}"
    if is_activation(module) or (name.endswith("Act") and not module._modules):
        return ACTIVATION
    return f"followed by {'a conv' if is_conv_like(module) else name}"


def _is_pooled(capture: Capture, call: Call, rank: int) -> bool:
    producer = capture.producer(call)
    while producer is not None:
        node = producer.node
        if node.op == "call_module":
            module = capture.module(capture.path_of(producer))
            if type(module).__name__.startswith(_POOLS):
                size = getattr(module, "output_size", 1)
                return size in (1, (1, 1), (1, 1, 1), None, "")
            if not (_keeps_one_pixel(module) or is_norm(module) or is_activation(module)):
                return False
        elif node.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
            return node.args[1] in (1, (1, 1), [1, 1])
        elif node.target in ("mean", torch.mean):
            return _is_global_mean(node, rank)
        elif kind_of(capture, producer) not in (NORM, ACTIVATION, PASSED):
            return False
        producer = capture.producer(producer)
    return False


def _is_global_mean(node: fx.Node, rank: int) -> bool:
    """Whether a mean goes over all `rank` spatial axes, and not over the channels, and keeps them.

    A mean over the channels alone leaves a map of full size (spatial attention).
    """
    names = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | dict(node.kwargs)
    dims = names.get("dim")
    axes = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    is_spatial = all(isinstance(a, int) and (a >= 2 or -rank <= a < 0) for a in axes)
    return bool(names.get("keepdim")) and is_spatial and len(axes) == rank


def _keeps_one_pixel(module: nn.Module) -> bool:
    kernel = getattr(module, "kernel_size", None)
    pointwise = is_conv_like(module) and isinstance(kernel, tuple) and set(kernel) == {1}
    return pointwise or isinstance(module, nn.Identity) or is_dropout(module)
