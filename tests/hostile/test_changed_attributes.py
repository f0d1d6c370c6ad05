"""Layers whose attributes were set after they were built, before the verbs or within forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.hostile.forms import SIZE, Form, Pair
from tests.hostile.judging import exact_or_refused


def changed(change: Callable[[Pair], None], **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Pair()
        if options:
            model.conv = nn.Conv2d(SIZE, SIZE, 3, padding=1, **options)
        change(model)
        return model

    return make


def sets(name: str, value: Any, of: str = "conv") -> Callable[[Pair], None]:
    return lambda model: setattr(getattr(model, of), name, value)


def no_bias(model: Pair) -> None:
    model.conv.bias = None


def new_weight(model: Pair) -> None:
    model.conv.weight = nn.Parameter(torch.randn(SIZE, SIZE, 1, 1))
    model.conv.padding = (0, 0)


def fewer_filters(model: Pair) -> None:
    """Pruned by hand: the class's numbers are not told."""
    model.conv.weight = nn.Parameter(model.conv.weight[:4].detach())
    model.conv.bias = nn.Parameter(model.conv.bias[:4].detach())
    model.norm = nn.BatchNorm2d(4)


def no_affine(model: Pair) -> None:
    model.norm.weight = None
    model.norm.bias = None


def only_a_weight(model: Pair) -> None:
    model.norm.bias = None


def frozen_kernel(model: Pair) -> None:
    kernel = model.conv.weight.detach()
    del model.conv.weight
    model.conv.register_buffer("weight", kernel)


def plain_kernel(model: Pair) -> None:
    kernel = model.conv.weight.detach().double()
    del model.conv.weight
    model.conv.weight = kernel


def own_forward(model: Pair) -> None:
    conv = model.conv
    conv.forward = lambda x: F.conv2d(x, conv.weight, conv.bias, padding=2)


def forward_of_norm(model: Pair) -> None:
    norm = model.norm
    norm.forward = lambda x: x * norm.weight.view(1, -1, 1, 1)


def other_class(model: Pair) -> None:
    class Negated(nn.Conv2d):
        def forward(self, x: Any) -> Any:
            return -super().forward(x)

    model.conv.__class__ = Negated


class SetsEps(Pair):
    def forward(self, x: Any) -> Any:
        self.norm.eps = 0.5
        return self.norm(self.conv(x))


class SetsPadding(Pair):
    def forward(self, x: Any) -> Any:
        self.conv.padding = (0, 0)
        return self.norm(self.conv(x))


class SetsStride(Pair):
    """The second call has another stride than the first."""

    def forward(self, x: Any) -> Any:
        y = self.norm(self.conv(x))
        self.conv.stride = (2, 2)
        return y


class SetsDilation(nn.Module):
    """The parent sets what its child reads."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Pair()

    def forward(self, x: Any) -> Any:
        for rate in (1, 2):
            self.child.conv.dilation = self.child.conv.padding = (rate, rate)
            x = self.child(x)
        return x


class SetsMomentum(Pair):
    def forward(self, x: Any) -> Any:
        self.norm.momentum = 0.5
        return self.norm(self.conv(x))


class SetsBias(Pair):
    def forward(self, x: Any) -> Any:
        self.conv.bias.data = torch.zeros_like(self.conv.bias)
        return self.norm(self.conv(x))


class Clips(Pair):
    """The kernel is bounded before each call, without gradients."""

    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            self.conv.weight.clamp_(-0.05, 0.05)
        return self.norm(self.conv(x))


class RenormData(nn.Module):
    class Bounded(nn.Conv2d):
        def forward(self, x: Any) -> Any:
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = self.Bounded(SIZE, SIZE, 3, padding=1), nn.BatchNorm2d(SIZE)

    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(x))


class Swaps(Pair):
    """The norm is another one at the second call."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(SIZE, affine=False)

    def forward(self, x: Any) -> Any:
        y = self.norm(self.conv(x))
        self.norm = self.other
        return y


FORMS = {
    "stride an int": Form(changed(sets("stride", 1), stride=2), norms=0, blocks=1),
    "stride a list": Form(changed(sets("stride", [2, 1])), norms=0, blocks=1),
    "padding an int": Form(changed(sets("padding", 2)), norms=0, blocks=1),
    "padding a name": Form(changed(sets("padding", "same"))),
    "dilation an int": Form(changed(sets("dilation", 2))),
    "padding of a reflecting conv": Form(changed(sets("padding", (0, 0)), padding_mode="reflect")),
    "padding mode": Form(changed(sets("padding_mode", "circular"))),
    "zeros again": Form(changed(sets("padding_mode", "zeros"), padding_mode="replicate")),
    "groups": Form(changed(sets("in_channels", 99))),
    "eps": Form(changed(sets("eps", 0.3, "norm")), norms=0, blocks=1),
    "momentum": Form(changed(sets("momentum", None, "norm")), norms=0, blocks=1),
    "number of features": Form(changed(sets("num_features", 99, "norm"))),
    "no bias": Form(changed(no_bias), norms=0, blocks=1),
    "another weight": Form(changed(new_weight)),
    "fewer filters": Form(changed(fewer_filters)),
    "no affine": Form(changed(no_affine)),
    "norm with a weight alone": Form(changed(only_a_weight)),
    "kernel a buffer": Form(changed(frozen_kernel)),
    "kernel a plain tensor": Form(changed(plain_kernel)),
    "forward of the conv": Form(changed(own_forward)),
    "forward of the norm": Form(changed(forward_of_norm)),
    "class of the conv": Form(changed(other_class)),
    "forward sets eps": Form(SetsEps),
    "forward sets padding": Form(SetsPadding),
    "forward sets stride": Form(SetsStride),
    "forward sets a child's dilation": Form(SetsDilation),
    "forward sets momentum": Form(SetsMomentum),
    "forward sets the bias": Form(SetsBias),
    "forward clips the kernel": Form(Clips),
    "forward bounds .data": Form(RenormData),
    "forward swaps the norm": Form(Swaps),
}

test_exact_or_refused = exact_or_refused(FORMS)
