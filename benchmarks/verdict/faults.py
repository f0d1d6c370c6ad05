"""Faults: a right net, one thing that is wrong with it, and inputs; a verdict must catch each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from benchmarks.verdict.nets import Segmenter, conv_norm, subject
from orepa_compiler.errors import NoVerdict
from orepa_compiler.verification import verify_callables

Change = Callable[[Any, tuple[Tensor, ...]], Any]


class Wrapped(nn.Module):
    """A model whose outputs, or whose inputs, another function sees first."""

    def __init__(self, body: nn.Module, after: Change, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.after, self.before = body, after, before

    def forward(self, x: Tensor) -> Any:
        return self.after(self.body(self.before(x)), (x,))


def after(change: Change) -> Callable[[nn.Module], nn.Module]:
    """A candidate that changes the outputs; it sees the inputs too."""
    return lambda model: Wrapped(model, change, lambda x: x)


def before(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    """A candidate that changes the inputs."""
    return lambda model: Wrapped(model, lambda y, inputs: y, change)


def at(index: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(y: Tensor) -> Tensor:
        y = y.clone()
        y[index] = change(y[index])
        return y

    return apply


def in_layer(number: int, change: Callable[[Any], Any]) -> Callable[[nn.Module], nn.Module]:
    """A candidate whose conv or linear layer of that number is changed, or replaced."""

    def apply(model: nn.Module) -> nn.Module:
        bad = copy.deepcopy(model)
        layers = [(p, m) for p, m in bad.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        path, layer = layers[number]
        with torch.no_grad():
            found = change(layer)
        if isinstance(found, nn.Module):
            bad.set_submodule(path, found)
        return bad

    return apply


def weight(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    return lambda layer: layer.weight.copy_(change(layer.weight.clone()))


def bias(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    return lambda layer: layer.bias.copy_(change(layer.bias.clone()))


class Stale(nn.Module):
    """What it gave first, for ever: kept under the shape of its input, or once for all."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.kept = body, {}

    def forward(self, x: Tensor) -> Any:
        return self.kept.setdefault(tuple(x.shape), self.body(x))


class Drifting(nn.Module):
    """A little more with every call."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.calls = body, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.body(x) * (1 + 0.01 * self.calls)


class Cast(nn.Module):
    """A layer that rounds what it gives to another type."""

    def __init__(self, body: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = body, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).to(self.dtype).to(x.dtype)  # type: ignore[no-any-return]


def _padded(mode: str, *pads: int) -> Callable[[Any], nn.Module]:
    def apply(conv: Any) -> nn.Module:
        plain = copy.deepcopy(conv)
        plain.padding = (0, 0)
        return Wrapped(plain, lambda y, inputs: y, lambda x: F.pad(x, pads, mode))

    return apply


def _batch_only(y: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    return y.roll(1, 0) if len(y) > 1 else y


MAP = ("map", lambda: (nn.Sequential(conv_norm(3, 8), nn.ReLU(), conv_norm(8, 8)), (2, 3, 16, 16)))
SCORES = ("scores", lambda: (subject("1000 classes", 0).model, (2, 3, 32, 32)))
MASKS = ("masks", lambda: (Segmenter(8, 5), (2, 3, 16, 16)))

Make = tuple[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]]


def _named(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    return after(lambda y, inputs: {**y, key: change(y[key])})


# What the outputs of a feature map, of scores and of masks can be wrong in.
ON_MAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "one pixel in a corner": after(lambda y, i: at((0, 0, 0, 0), lambda v: v + 1e-3)(y)),
    "one pixel in the last corner": after(lambda y, i: at((1, 7, 15, 15), lambda v: v - 1e-3)(y)),
    "one row at the border": after(lambda y, i: at((..., 0, slice(None)), lambda v: v * 1.001)(y)),
    "one column at the border": after(lambda y, i: at((..., -1), lambda v: v * 1.001)(y)),
    "one channel of one image": after(lambda y, i: at((1, 3), lambda v: v * 1.01)(y)),
    "two channels exchanged": after(lambda y, i: y[:, [1, 0, *range(2, 8)]]),
    "rows and columns exchanged": after(lambda y, i: y.transpose(2, 3)),
    "shifted by one pixel": after(lambda y, i: y.roll(1, 3)),
    "upside down": after(lambda y, i: y.flip(2)),
    "only with more than one image": after(_batch_only),
    "the second image is the first": after(lambda y, i: y[:1].expand_as(y)),
    "only large inputs": after(lambda y, i: y * (1.01 if i[0].abs().max() > 20 else 1)),
    "only small inputs": after(lambda y, i: y * (1.01 if i[0].abs().max() < 0.2 else 1)),
    "only constant inputs": after(lambda y, i: y + (0.1 if i[0].std() < 1e-6 else 0)),
    "the input ignored": before(torch.zeros_like),
    "one input channel ignored": before(lambda x: at((slice(None), 2), torch.zeros_like)(x)),
    "input channels reversed": before(lambda x: x.flip(1)),
    "the input clamped": before(lambda x: x.clamp(-2, 2)),
    "the input in bytes": before(lambda x: (x * 32).round() / 32),
    "the input normalized twice": before(lambda x: (x - 0.01) / 1.01),
    "the input in float16": before(lambda x: x.half().float()),
    "stale state": Stale,
    "drifting with each call": Drifting,
    "noise": after(lambda y, i: y + 1e-3 * torch.randn_like(y)),
    "dropout left on": after(lambda y, i: F.dropout(y, 0.01, training=True)),
    "clamped from above": after(lambda y, i: y.clamp(max=3.0)),
    "a ReLU too many": after(lambda y, i: y.relu()),
    "absolute values": after(lambda y, i: y.abs()),
    "another dtype": after(lambda y, i: y.double()),
    "an axis more": after(lambda y, i: y[None]),
    "wrapped in a dict": after(lambda y, i: {"out": y}),
    "wrapped in a list": after(lambda y, i: [y]),
    "nothing": after(lambda y, i: None),
    "NaN in one place": after(lambda y, i: at((0, 0, 0, 0), lambda v: v * torch.nan)(y)),
    "a bias off by a thousandth": in_layer(1, bias(lambda b: b * 1.001)),
    "one bias off": in_layer(0, bias(lambda b: b + 0.001 * (torch.arange(8) == 5))),
    "a kernel flipped": in_layer(0, weight(lambda w: w.flip(3))),
    "a tap forgotten": in_layer(1, weight(lambda w: w * (torch.arange(3) != 2))),
    "a kernel in float16": in_layer(1, weight(lambda w: w.half().float())),
    "a kernel in bfloat16": in_layer(0, weight(lambda w: w.bfloat16().float())),
    "a kernel in eight bits": in_layer(0, weight(lambda w: (w * 127).round() / 127)),
    "one weight off by 5 %": in_layer(0, weight(lambda w: w * (1 + 0.05 * (w == w.amax())))),
    "a sign of one weight": in_layer(1, weight(lambda w: w.where(w != w.amax(), -w))),
    "padded by reflection": in_layer(1, _padded("reflect", 1, 1, 1, 1)),
    "padded by the border": in_layer(0, _padded("replicate", 1, 1, 1, 1)),
    "padded to one side": in_layer(1, _padded("constant", 2, 0, 1, 1)),
    "bfloat16 within": in_layer(0, lambda layer: Cast(copy.deepcopy(layer), torch.bfloat16)),
    "float16 within": in_layer(1, lambda layer: Cast(copy.deepcopy(layer), torch.float16)),
}
ON_SCORES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "one class of a thousand": after(lambda y, i: at((..., 777), lambda v: v + 1e-3)(y)),
    "two classes of a thousand exchanged": after(
        lambda y, i: y[:, [*range(500), 501, 500, *range(502, 1000)]]
    ),
    "classes moved by one": after(lambda y, i: y.roll(1, 1)),
    "a softmax too many": after(lambda y, i: y.softmax(1)),
    "a temperature": after(lambda y, i: y * 1.0001),
    "one class less": after(lambda y, i: y[:, :999]),
    "the mean taken away": after(lambda y, i: y - y.mean(1, keepdim=True)),
    "one weight of the classifier": in_layer(
        2, weight(lambda w: w + 0.01 * (torch.arange(w.numel()).view_as(w) == 12345))
    ),
    "the classifier's bias forgotten": in_layer(2, bias(torch.zeros_like)),
    "the stem in bfloat16": in_layer(0, weight(lambda w: w.bfloat16().float())),
}
ON_MASKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "one pixel of a mask": _named("mask", lambda m: at((0, 3, 3), torch.logical_not)(m)),
    "a mask inverted": _named("mask", torch.logical_not),
    "a mask shifted": _named("mask", lambda m: m.roll(1, -1)),
    "a mask all true": _named("mask", torch.ones_like),
    "a mask in bytes": _named("mask", lambda m: m.to(torch.uint8)),
    "one class id": _named("classes", lambda c: at((0, 5, 5), lambda v: (v + 1) % 5)(c)),
    "class ids moved by one": _named("classes", lambda c: (c + 1) % 5),
    "a class id that is none": _named("classes", lambda c: at((1, 0, 0), lambda v: v + 5)(c)),
    "class ids in int32": _named("classes", lambda c: c.to(torch.int32)),
    "the least in place of the largest": _named("classes", lambda c: 4 - c),
    "an output left out": after(lambda y, i: {k: v for k, v in y.items() if k != "mask"}),
    "an output renamed": after(lambda y, i: {{"mask": "masks"}.get(k, k): v for k, v in y.items()}),
    "an output nested": after(lambda y, i: {**y, "scores": {"all": y["scores"]}}),
    "the border of the scores": _named("scores", lambda s: at((..., 0), lambda v: v * 1.01)(s)),
}
KINDS: tuple[tuple[Make, dict[str, Callable[[nn.Module], nn.Module]]], ...] = (
    (MAP, ON_MAPS),
    (SCORES, ON_SCORES),
    (MASKS, ON_MASKS),
)


@dataclass(frozen=True)
class Fault:
    """One fault in one kind of net."""

    kind: str
    name: str
    make: Callable[[], tuple[nn.Module, tuple[int, ...]]]
    spoil: Callable[[nn.Module], nn.Module]

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def faults() -> list[Fault]:
    """Every fault, in the net that it belongs to."""
    return [
        Fault(kind, name, make, spoil)
        for (kind, make), table in KINDS
        for name, spoil in table.items()
    ]


def passes(fault: Fault, *, is_spoilt: bool = True) -> bool:
    """Whether the candidate passes. Without its fault it has to: else nothing was tried."""
    torch.manual_seed(0)
    model, shape = fault.make()
    model = _trained(model).eval()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    right = orepa.collapse(model)
    candidate = fault.spoil(right).eval() if is_spoilt else right
    try:
        return bool(verify_callables(model, candidate, inputs, stress=True))
    except NoVerdict:
        return False


@torch.no_grad()
def _trained(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-0.5, 0.5)
            module.bias.uniform_(-0.5, 0.5)
    return model
