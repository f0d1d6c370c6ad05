"""Infers from one layer or function the form of the map it reads, and of the one it gives."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.padding import _ConstantPadNd

from orepa_compiler.algebra.classifiers import (
    has_activation,
    is_activation,
    is_batch_norm,
    is_dropout,
    is_tracked_instance_norm,
    norm_maps,
)
from orepa_compiler.algebra.layers import has_handler, linear_part
from orepa_compiler.algebra.maps import Maps, second
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.algebra.overriding import has_torch_forward
from orepa_compiler.analysis.elementwise import arithmetic
from orepa_compiler.analysis.forms import NOTHING, MapForm, at_least, beside_channels, check_type
from orepa_compiler.analysis.functional import conv_called, functional_conv
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture.constants import as_tensor
from orepa_compiler.capture.memory import is_in_place
from orepa_compiler.capture.tracing.proxies import write_
from orepa_compiler.errors import NotLinear

# Functions and methods that give each number of a map another one.
_ELEMENTWISE = {
    "relu", "relu6", "gelu", "silu", "elu", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh",
    "mish", "softplus", "sigmoid", "tanh", "softmax", "log_softmax", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "contiguous", "clone", "detach",
}  # fmt: skip
_MOVES = {"permute", "view", "reshape"}


@dataclass(frozen=True)
class FormRule:
    """before, after: what a node tells of its operand, and of what it gives.

    reach: on how many of the last axes it works; a map whose channels are not among these keeps
    them. None: the axes are not kept. keeps_count: whether the number of axes is. gives_type,
    needs_type: whether what it gives is of the type of its operand, and the other way round.
    """

    operand: fx.Node
    before: MapForm = NOTHING
    after: MapForm = NOTHING
    reach: int | None = None
    keeps_count: bool = False
    gives_type: bool = False
    needs_type: bool = False

    def kept(self, form: MapForm, *, is_forth: bool) -> MapForm:
        """What of the form of one side is that of the other side too."""
        rank = form.maps.axes.rank if form.maps else None
        is_kept = self.reach == 0 or (self.reach and rank is not None and rank >= self.reach)
        is_typed = self.gives_type if is_forth else self.needs_type
        return MapForm(
            form.maps if is_kept else None,
            form.counts if self.keeps_count else NOTHING.counts,
            form.dtype if is_typed else None,
            form.is_batched and self.keeps_count,
        )


def _same(operand: fx.Node, reach: int = 0, counts: frozenset[int] = NOTHING.counts) -> FormRule:
    """Tells that a call keeps the form of a map, and its type."""
    form = MapForm(counts=counts)
    return FormRule(operand, form, form, reach, keeps_count=True, gives_type=True, needs_type=True)


def layer_rule(layer: nn.Module, operand: fx.Node) -> FormRule:
    """What a layer that is called on one map tells."""
    home = type(layer).__module__
    if is_dropout(layer) or (isinstance(layer, nn.Identity) and has_torch_forward(layer)):
        return _same(operand)
    if is_activation(layer) and not isinstance(layer, nn.GLU):
        return replace(_same(operand), needs_type=False)
    if home == "torch.nn.modules.pooling" and not getattr(layer, "return_indices", False):
        return _pooled(operand, type(layer).__name__)
    if home == "torch.nn.modules.padding":
        reach = len(layer.padding) // 2  # type: ignore[arg-type]
        counts = NOTHING.counts if isinstance(layer, _ConstantPadNd) else _of_conv(reach)
        return _same(operand, reach, counts)
    if home == "torch.nn.modules.upsampling":
        return _same(operand, 1)
    if home == "torch.nn.modules.flatten" and isinstance(layer, nn.Flatten):
        return _flattened(operand, layer.start_dim, layer.end_dim)
    if home == "torch.nn.modules.normalization":
        return _same(operand)
    return _linear_rule(layer, operand)


def _pooled(operand: fx.Node, name: str) -> FormRule:
    """Tells what average pooling makes of the form of a map."""
    rank = next((r for r in (1, 2, 3) if f"{r}d" in name), None)
    return _same(operand, rank, _of_conv(rank)) if rank else FormRule(operand)


def _of_conv(rank: int) -> frozenset[int]:
    """How many axes the map of a conv may have: it takes one without a batch too."""
    return frozenset({rank + 1, rank + 2})


def _linear_rule(layer: nn.Module, operand: fx.Node) -> FormRule:
    """Tells what a layer that is an operator, or like one, makes of the form of a map."""
    if isinstance(layer, _ConvTransposeNd) and has_torch_forward(layer):
        shape = layer.weight.shape
        channels = shape[0], shape[1] * layer.groups
        return _conv_rule(operand, channels, len(shape) - 2, layer.weight.dtype)
    if isinstance(layer, ConvBlock):
        channels, rank = (layer.in_channels, layer.out_channels), len(layer.kernel_size)
        return _conv_rule(operand, channels, rank, next(layer.parameters()).dtype)
    if is_tracked_instance_norm(layer):  # it takes a map without a batch too
        return FormRule(operand)
    if is_batch_norm(layer):
        is_known = not has_handler(layer) or has_torch_forward(layer) or has_activation(layer)
        maps = norm_maps(layer) if is_known else None
        return FormRule(operand) if maps is None else _norm_rule(operand, maps)
    if not has_handler(layer):
        return FormRule(operand)
    try:
        op, _ = linear_part(layer)
    except NotLinear:
        return FormRule(operand)
    if isinstance(layer, _ConvNd):
        return _conv_rule(operand, (op.in_channels, op.out_channels), op.rank, op.weight.dtype)
    return replace(_told(operand, op), keeps_count=isinstance(layer, nn.Linear))


def _told(operand: fx.Node, op: ConvOperator) -> FormRule:
    dtype = _floating(op.weight.dtype)
    return FormRule(operand, MapForm(op.reads, dtype=dtype), MapForm(op.gives, dtype=dtype))


def _conv_rule(
    operand: fx.Node, channels: tuple[int, int], rank: int, dtype: torch.dtype
) -> FormRule:
    before, after = (
        MapForm(Maps(c, second(rank)), _of_conv(rank), _floating(dtype)) for c in channels
    )
    return FormRule(operand, before, after, keeps_count=True)


def _norm_rule(operand: fx.Node, maps: Maps) -> FormRule:
    """Tells what a norm reads: batches; those of half precision too, where its own is full."""
    ranks = maps.axes.ranks
    counts = at_least(2) if ranks is None else frozenset(rank + 2 for rank in ranks)
    form = MapForm(maps, counts, is_batched=True)
    return FormRule(operand, form, form, keeps_count=True, gives_type=True, needs_type=True)


def _floating(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype.is_floating_point else None


def _flattened(operand: fx.Node, first: Any, last: Any) -> FormRule:
    after = MapForm(counts=frozenset({2})) if (first, last) == (1, -1) else NOTHING
    return FormRule(operand, MapForm(counts=at_least(1)), after, gives_type=True, needs_type=True)


def function_rule(
    node: fx.Node, operand: fx.Node, forms: tuple[MapForm, MapForm], constant: Callable[[Any], Any]
) -> FormRule:
    """What a function or method of one map tells.

    forms: what is known of the operand, and of what it gives. constant: gives an argument without
    values.
    """
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    is_first = bool(node.args) and node.args[0] is operand
    try:
        if functional_conv(node):
            op = conv_called(node, constant)
            return _function_of(operand, node, op) if op else FormRule(operand)
        if node.target is F.batch_norm and is_first:
            mean = constant(node.args[1] if len(node.args) > 1 else node.kwargs["running_mean"])
            maps = Maps(mean.shape[0], second()) if isinstance(mean, Tensor) else None
            return _norm_rule(operand, maps) if maps else _same(operand, 0, at_least(2))
        if arithmetic(node):
            return _arithmetic_rule(node, operand, forms, constant)
    except (NotLinear, KeyError, AttributeError):
        return FormRule(operand)
    if not is_first:
        return FormRule(operand)
    if name in _ELEMENTWISE:
        return replace(_same(operand), needs_type=name in ("contiguous", "clone", "detach"))
    if node.target is F.pad:
        pad = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
        return (
            _same(operand, len(pad) // 2) if isinstance(pad, (list, tuple)) else FormRule(operand)
        )
    if "_pool" in name and "return_indices" not in node.kwargs and len(node.args) < 7:
        return _pooled(operand, name)
    if node.target is F.interpolate:
        return _same(operand, 1)
    return _reshaped(node, operand, name, forms[0])


def _function_of(operand: fx.Node, node: fx.Node, op: ConvOperator) -> FormRule:
    if op.rank:
        return _conv_rule(operand, (op.in_channels, op.out_channels), op.rank, op.weight.dtype)
    return replace(_told(operand, op), keeps_count=True)


def _arithmetic_rule(
    node: fx.Node, operand: fx.Node, forms: tuple[MapForm, MapForm], constant: Callable[[Any], Any]
) -> FormRule:
    """Tells the form of x * gamma: a number keeps it, a tensor that of a map which it fits."""
    found = arithmetic(node)
    assert found is not None
    if found.left is operand and is_in_place(node):
        return _same(operand)
    other = constant(found.right if found.left is operand else found.left)
    if isinstance(other, Tensor):
        return _widened(operand, *forms, other)
    if as_tensor(other) is None:
        return FormRule(operand)
    return replace(_same(operand), needs_type=False)


def _widened(operand: fx.Node, form: MapForm, after: MapForm, constant: Tensor) -> FormRule:
    """Tells that a map beside a tensor with fewer axes had its axes before."""
    counts = frozenset(c for c in form.counts if max(c, constant.dim()) in after.counts)
    is_own = bool(counts) and min(counts) > constant.dim()
    before = MapForm(counts=counts or form.counts, is_batched=is_own and after.is_batched)
    try:
        beside_channels(constant, form)
        check_type(constant, form)
    except NotLinear:
        return FormRule(operand, before)
    return FormRule(operand, before, after=form)


def sum_form(node: fx.Node, left: MapForm, right: MapForm) -> MapForm:
    """The form of what a node computes of two maps."""
    if arithmetic(node) is None:
        return NOTHING
    counts = frozenset(max(a, b) for a in left.counts for b in right.counts)
    return MapForm(
        left.maps if left.maps == right.maps else None,
        counts,
        left.dtype if left.dtype == right.dtype else None,
    )


def _reshaped(node: fx.Node, operand: fx.Node, name: str, form: MapForm) -> FormRule:
    """Tells that what moves the numbers of a map keeps their type."""
    typed = FormRule(operand, gives_type=True, needs_type=True)
    given = node.args[1:]
    if node.target in (operator.getitem, write_):
        parts = given[0] if isinstance(given[0], tuple) else (given[0],)
        slices = sum(isinstance(part, slice) for part in parts)
        if slices + parts.count(Ellipsis) < len(parts):
            return FormRule(operand)
        reach = 0 if node.target is write_ else _cut_from(parts, form.count)
        return replace(
            typed, before=MapForm(counts=at_least(slices)), keeps_count=True, reach=reach
        )
    if name == "flatten" and not node.kwargs:
        return _flattened(operand, (given or (0,))[0], (*given[1:2], -1)[0])
    if name in _MOVES and not node.kwargs:
        sizes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        if len(given) == 1 and sizes is given:  # x.view(shape), or a type
            return FormRule(operand)
        told = MapForm(counts=frozenset({len(sizes)}))
        return replace(typed, before=told if name == "permute" else NOTHING, after=told)
    return replace(typed, keeps_count=True) if name == "transpose" else FormRule(operand)


def _cut_from(parts: tuple[Any, ...], count: int | None) -> int | None:
    """How many of the last axes an index may cut, of a map with `count` axes; None: not known."""
    cut = [part is Ellipsis or part != slice(None) for part in parts]
    first = cut.index(True) if True in cut else len(parts)
    if Ellipsis in parts:
        return len(parts) - first - 1 if parts[first] is Ellipsis else None
    return None if count is None else max(count - first, 0)
