"""Weights that a forward reads itself: by name, by iteration, through functional_call, or tied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from tests.hostile.forms import SIZE, Form, Pair, conv
from tests.hostile.judging import exact_or_refused


def energy(tensors: Any) -> Any:
    return sum(tensor.double().pow(2).sum() for tensor in tensors)


class Parameters(Pair):
    def forward(self, x: Any) -> Any:
        return super().forward(x), energy(self.conv.parameters())


class AllParameters(nn.Module):
    """The parent reads what its child's layers hold."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Pair()

    def forward(self, x: Any) -> Any:
        return self.body(x), energy(self.parameters())


class NamedParameters(Pair):
    def forward(self, x: Any) -> Any:
        named = dict(self.named_parameters())
        return super().forward(x) * named["conv.weight"].abs().mean()


class StateDict(Pair):
    def forward(self, x: Any) -> Any:
        state = self.state_dict(keep_vars=True)
        return super().forward(x), state["conv.weight"].sum(), state["norm.running_mean"].sum()


class Underscored(Pair):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + self.conv._parameters["weight"].mean()


class GetParameter(Pair):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + self.get_parameter("conv.weight").mean()


class Flattened(Pair):
    def forward(self, x: Any) -> Any:
        return super().forward(x), parameters_to_vector(self.conv.parameters()).norm()


class Buffers(Pair):
    def forward(self, x: Any) -> Any:
        means = [b.mean() for name, b in self.named_buffers() if name.endswith("running_mean")]
        return super().forward(x) + means[0]


class Functional(Pair):
    """The net is run with its weights halved."""

    def forward(self, x: Any) -> Any:
        halved = {name: p / 2 for name, p in self.conv.named_parameters()}
        return self.norm(functional_call(self.conv, halved, (x,)))


class Modulated(Pair):
    def forward(self, x: Any) -> Any:
        weight = self.conv.weight * torch.sigmoid(self.conv.weight.mean((1, 2, 3), keepdim=True))
        return self.norm(F.conv2d(x, weight, self.conv.bias, padding=1))


class BesideItsOwn(Pair):
    """The conv runs, and its kernel once more with a wider grid."""

    def forward(self, x: Any) -> Any:
        wide = F.conv2d(x, self.conv.weight, None, padding=2, dilation=2)
        return self.norm(self.conv(x)) + wide


class TiedByParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = conv(), conv(), nn.BatchNorm2d(SIZE)
        self.second.weight = self.first.weight

    def forward(self, x: Any) -> Any:
        return self.second(F.relu(self.norm(self.first(x))))


class TiedToOwn(Pair):
    """A parameter of the model's own that is the conv's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = self.conv.weight

    def forward(self, x: Any) -> Any:
        return F.conv_transpose2d(super().forward(x), self.kernel, padding=1)


class Decoder(nn.Module):
    """Runs an encoder's kernel backwards; how it gets at it differs."""

    def __init__(self, reach: Any) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.reach = reach

    def kernel(self) -> Tensor:
        reach = self.reach
        if isinstance(reach, dict):
            return reach["weight"]
        if isinstance(reach, list):
            return reach[0].weight
        return reach.conv.weight if isinstance(reach, SimpleNamespace) else reach()

    def forward(self, y: Any) -> Any:
        return F.conv_transpose2d(y, self.kernel(), padding=1) * self.gain


class Autoencoder(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.encoder = Pair()
        made = self.encoder.conv
        self.decoder = Decoder(
            {
                "list": [made],
                "dict of tensors": {"weight": made.weight},
                "namespace": SimpleNamespace(conv=made),
                "closure": lambda: made.weight,
                "bound method": made.get_parameter,
            }[way]
        )
        if way == "bound method":
            self.decoder.reach = BoundWeight(made.get_parameter)

    def forward(self, x: Any) -> Any:
        return self.decoder(self.encoder(x))


class BoundWeight:
    def __init__(self, method: Any) -> None:
        self.method = method

    def __call__(self) -> Tensor:
        return self.method("weight")


class BatchNormWeights(Pair):
    """A penalty on the norm's scale, as slimming has it."""

    def forward(self, x: Any) -> Any:
        return super().forward(x), self.norm.weight.abs().sum()


class Compared(Pair):
    """An attention between what two convs hold."""

    def forward(self, x: Any) -> Any:
        kernels = torch.stack([p.flatten() for p in self.conv.parameters() if p.ndim == 4])
        return super().forward(x) * kernels.std()


FORMS = {
    "parameters()": Form(Parameters),
    "parameters() of the parent": Form(AllParameters),
    "named_parameters()": Form(NamedParameters),
    "state_dict()": Form(StateDict),
    "_parameters[...]": Form(Underscored),
    "get_parameter": Form(GetParameter),
    "parameters_to_vector": Form(Flattened),
    "named_buffers()": Form(Buffers),
    "functional_call": Form(Functional),
    "modulated": Form(Modulated),
    "kernel used twice": Form(BesideItsOwn),
    "one parameter of two convs": Form(TiedByParameter),
    "a parameter with two names": Form(TiedToOwn),
    **{
        f"tied through a {way}": Form(lambda way=way: Autoencoder(way))
        for way in ("list", "dict of tensors", "namespace", "closure", "bound method")
    },
    "norm's weight": Form(BatchNormWeights),
    "stacked": Form(Compared),
}

test_exact_or_refused = exact_or_refused(FORMS)
