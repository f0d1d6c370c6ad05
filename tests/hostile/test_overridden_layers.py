"""Layers of torch's classes that override a method or a property, and do something else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.hostile.forms import SIZE, Form, Pair
from tests.hostile.judging import exact_or_refused


class CallsTwice(nn.Conv2d):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(super().__call__(*args, **kwargs))


class ConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class WeightProperty(nn.Conv2d):
    """The kernel is made of two parameters."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.first = nn.Parameter(self._parameters.pop("weight"))
        self.gain = nn.Parameter(torch.full((1,), 2.0))

    @property
    def weight(self) -> Tensor:
        return self.first * self.gain

    @weight.setter
    def weight(self, value: Tensor) -> None:
        pass


class PaddingProperty(nn.Conv2d):
    @property
    def padding(self) -> tuple[int, int]:
        return (0, 1)

    @padding.setter
    def padding(self, value: Any) -> None:
        pass


class StrideProperty(nn.Conv2d):
    @property
    def stride(self) -> tuple[int, int]:
        return (2, 2)

    @stride.setter
    def stride(self, value: Any) -> None:
        pass


class Attributed(nn.Conv2d):
    """__getattr__ gives another kernel."""

    def reset_parameters(self) -> None:
        for parameter in self._parameters.values():
            nn.init.normal_(parameter, std=0.1)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found * 2 if name == "weight" else found


class Centred(nn.BatchNorm2d):
    def _check_input_dim(self, x: Any) -> None:
        with torch.no_grad():
            self.running_mean += 0.25


class EpsProperty(nn.BatchNorm2d):
    @property
    def eps(self) -> float:
        return 1.0

    @eps.setter
    def eps(self, value: float) -> None:
        pass


class Rectified(nn.BatchNorm2d):
    """A norm with its activation, as inplace_abn has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.1)


class NormCallsTwice(nn.BatchNorm2d):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(super().__call__(*args, **kwargs))


class OwnScale(nn.BatchNorm2d):
    """One more factor, and the class's own forward."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.extra = nn.Parameter(torch.full((1, SIZE, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.extra)


class OnePlus(nn.BatchNorm2d):
    """The scale is one plus the weight."""

    def forward(self, x: Tensor) -> Tensor:
        state = (self.running_mean, self.running_var, 1 + self.weight, self.bias)
        return F.batch_norm(x, *state, self.training, 0.1, self.eps)


class WithoutGradients(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Counting(nn.Conv2d):
    """Its own forward is torch's, but for a mark."""

    def forward(self, x: Tensor) -> Tensor:
        self.last_shape = tuple(x.shape)
        return super().forward(x)


class Doubles(nn.Sequential):
    """A container that is no chain."""

    def forward(self, x: Any) -> Any:
        for layer in self:
            x = layer(x) + x
        return x


class CallsBackwards(nn.Sequential):
    def __iter__(self) -> Any:
        return iter(list(self._modules.values())[::-1])


class CallOfContainer(nn.Sequential):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x) * 2


class NotIdentity(nn.Identity):
    def forward(self, x: Any) -> Any:
        return x.abs()


class NoDropout(nn.Dropout):
    def forward(self, x: Any) -> Any:
        return F.dropout(x, 0.0) * 0.5 + 0.1


class Leaky(nn.ReLU):
    def forward(self, x: Any) -> Any:
        return F.leaky_relu(x, 0.3)


class ShiftedLinear(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x.roll(1, -1))


def with_conv(kind: type[nn.Conv2d]) -> Any:
    def make() -> nn.Module:
        model = Pair()
        model.conv = kind(SIZE, SIZE, 3, padding=1)
        return model

    return make


def with_norm(kind: type[nn.BatchNorm2d]) -> Any:
    def make() -> nn.Module:
        model = Pair()
        model.norm = kind(SIZE)
        return model

    return make


def between(layer: Any) -> Any:
    return lambda: nn.Sequential(nn.Conv2d(SIZE, SIZE, 3), layer(), nn.BatchNorm2d(SIZE))


def container(kind: type[nn.Sequential]) -> Any:
    return lambda: kind(nn.Conv2d(SIZE, SIZE, 3, padding=1), nn.BatchNorm2d(SIZE), nn.Sigmoid())


CONVS = (CallsTwice, ConvForward, WeightProperty, PaddingProperty, StrideProperty, Attributed)
CONVS = (*CONVS, WithoutGradients, Counting)
NORMS = (Centred, EpsProperty, Rectified, NormCallsTwice, OwnScale, OnePlus)


class SeesFunctions(nn.Parameter):
    """A weight that every function is told of: what is computed with it is doubled."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made * 2 if getattr(func, "__name__", "") == "conv2d" else made


class WeightOfItsOwn(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.conv.weight = SeesFunctions(self.conv.weight.detach())


class DoubledByCheck(Pair):
    """A method was set on the norm itself, and writes over what it checks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm._check_input_dim = lambda x: x.mul_(2)  # type: ignore[method-assign]


FORMS = {
    "a weight that sees functions": Form(WeightOfItsOwn),
    "a check set on the norm": Form(DoubledByCheck),
    **{kind.__name__: Form(with_conv(kind)) for kind in CONVS},
    **{kind.__name__: Form(with_norm(kind)) for kind in NORMS},
    **{k.__name__: Form(container(k)) for k in (Doubles, CallsBackwards, CallOfContainer)},
    **{kind.__name__: Form(between(kind)) for kind in (NotIdentity, NoDropout, Leaky)},
    "ShiftedLinear": Form(
        lambda: nn.Sequential(
            ShiftedLinear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE)
        ),
        inputs=torch.randn(SIZE, SIZE, dtype=torch.float64),
    ),
}

test_exact_or_refused = exact_or_refused(FORMS)
