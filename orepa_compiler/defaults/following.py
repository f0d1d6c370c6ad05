"""Finds what stands before and behind a conv, which decides whether a block fits there.

It only chooses defaults. Whether a rewrite is exact never depends on what is found here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import fx, nn

from orepa_compiler.algebra.classifiers import (
    is_activation,
    is_conv_like,
    is_dropout,
    is_norm,
)
from orepa_compiler.analysis.elementwise import addition
from orepa_compiler.capture import Call, Capture
from orepa_compiler.capture.tracing.proxies import IN_PLACE_OPERATORS
from orepa_compiler.defaults.computed import (
    ACTIVATES,
    CLOSES,
    NORMALIZES,
    SCALES,
    computed_behind,
)

NORM, ACTIVATION, NOTHING = "norm", "activation", "nothing reads its output"
PASSED, GATE = "passed", "followed by the gate"

# A gate closes a side path; an activation on the main path is any other.
_GATES = ("Sigmoid", "Hardsigmoid", "HardSigmoid", "Softmax", "Tanh", "LogSigmoid")
_NORM_NAMES = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_ACTIVATION_NAMES = (
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "hardswish",
    "mish", "prelu", "rrelu", "softplus", "threshold", "hardtanh",
)  # fmt: skip
# Layers that keep channels apart, or whole: a norm behind them still normalizes what the conv
# gives, and an activation is one behind whatever moves numbers.
_PASSED_MODULES = (
    nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AvgPool3d, nn.ZeroPad2d, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle,
)  # fmt: skip
_PASSED_NAMES = (
    "permute", "transpose", "contiguous", "cat", "concat", "dropout", "max_pool2d", "avg_pool2d",
    "max_pool1d", "avg_pool1d", "max_pool3d", "avg_pool3d", "pad", "getitem", "interpolate",
    "pixel_shuffle", "pixel_unshuffle",
)  # fmt: skip
_RETURNED = "its output is the model's"
_COMPUTED = {ACTIVATES: ACTIVATION, NORMALIZES: NORM, SCALES: PASSED}
_SHAPE_READS = ("getattr", "size", "dim", "numel")
_POOLS = ("AdaptiveAvgPool", "AdaptiveMaxPool", "SelectAdaptivePool", "GlobalAvgPool")


def followed_by(capture: Capture, path: str) -> str:
    """What reads a conv's output: NORM, ACTIVATION, or in words what does."""
    calls = capture.calls.get(path, [])
    conv = capture.module(path)
    form = getattr(conv, "out_channels", 0), len(getattr(conv, "kernel_size", ()))
    seen: set[Call] = set()
    kinds = {kind for call in calls for kind in _kinds(capture, call, form, seen)}
    if len(kinds) == 1:
        return kinds.pop()
    if not path:
        return _RETURNED
    if not kinds:
        return NOTHING
    return f"several consumers: {', '.join(sorted(kinds))}"


def reads_pooled(capture: Capture, path: str) -> bool:
    """Whether the conv works on maps that were pooled to one pixel (squeeze-and-excitation)."""
    calls = capture.calls.get(path, [])
    rank = len(getattr(capture.module(path), "kernel_size", ()))
    return bool(calls) and all(_is_pooled(capture, call, rank) for call in calls)


def _kinds(capture: Capture, call: Call, form: tuple[int, int], seen: set[Call]) -> Iterator[str]:
    """What reads a value. form: the channels of its map, and how many axes are behind these.

    seen: the values that were looked at, since many ways may lead to one (DenseNet).
    """
    if call in seen:
        return
    seen.add(call)
    consumers = list(capture.consumers(call))
    kinds = [_kind(capture, each, form[1]) for each in consumers]
    if not {kind for kind in kinds if kind} <= {NORM, ACTIVATION, PASSED, _RETURNED}:
        end, found = _computed(capture, call, form)
        if found:
            yield from _kinds(capture, end, form, seen) if found == PASSED else [found]
            return
    for consumer, kind in zip(consumers, kinds, strict=True):
        if consumer and kind == PASSED:
            yield from _kinds(capture, consumer, form, seen)
        elif kind:
            yield kind


def _kind(capture: Capture, consumer: Call | None, rank: int) -> str | None:
    if consumer is None:
        return _RETURNED
    is_embedding = adds_per_channel(consumer.node, rank)
    return PASSED if is_embedding else role_of(capture, consumer)


def adds_per_channel(node: fx.Node, rank: int) -> bool:
    """Whether a node adds one number for each channel of each image: a time embedding.

    It was given so many axes of one position: y[:, :, None, None], y.unsqueeze(-1), y.view(n, c, 1)
    """
    added = addition(node)
    operands = (added.left, added.right) if added else ()
    return any(isinstance(each, fx.Node) and _ones(each) >= max(rank, 1) for each in operands)


def _ones(node: fx.Node) -> int:
    """How many axes of one position a value was given behind its others."""
    count = 0
    while len(node.args) > 1 and isinstance(node.args[0], fx.Node):
        name, rest = getattr(node.target, "__name__", node.target), list(node.args[1:])
        sizes = list(rest[0]) if isinstance(rest[0], (tuple, list)) else rest
        if name == "unsqueeze" and (rest[0] == -1 or (isinstance(rest[0], int) and rest[0] > 1)):
            count += 1
        elif name in ("getitem", "view", "reshape"):
            one = None if name == "getitem" else 1
            ones = [*takewhile(partial(operator.is_, one), reversed(sizes))]
            if not ones or (name == "getitem" and not isinstance(rest[0], tuple)):
                return count
            count += len(ones)
        else:
            return count
        node = node.args[0]
    return count


def _computed(capture: Capture, call: Call, form: tuple[int, int]) -> tuple[Call, str]:
    """What all readers of a value compute of it together, in the one forward that they stand in."""
    end, found = computed_behind(capture, call, *form)
    if found == CLOSES and _feeds_layers(capture, end):
        return end, ACTIVATION
    if found == CLOSES:
        name = end.node.target
        if end.node.op == "call_module":
            name = type(capture.module(capture.path_of(end))).__name__
        return end, f"{GATE} {getattr(name, '__name__', name)}"
    return end, _COMPUTED.get(found, "")


def _feeds_layers(capture: Capture, call: Call) -> bool:
    """Whether all that reads a value are layers with a kernel, or norms: no gate is read so."""
    readers = list(capture.consumers(call))
    return bool(readers) and all(
        reader is not None and _is_layer(capture, reader) for reader in readers
    )


def _is_layer(capture: Capture, reader: Call) -> bool:
    kind = role_of(capture, reader)
    if kind == PASSED:
        return _feeds_layers(capture, reader)
    if reader.node.op != "call_module":
        return kind == NORM
    module = capture.module(capture.path_of(reader))
    return kind == NORM or is_conv_like(module) or isinstance(module, nn.Linear)


def role_of(capture: Capture, consumer: Call) -> str | None:
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
        elif role_of(capture, producer) not in (NORM, ACTIVATION, PASSED):
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
