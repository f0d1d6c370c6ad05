"""Hooks of every kind on a conv, a norm, a container, and weights that something else makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from tests.hostile.forms import SIZE, Form, conv
from tests.hostile.judging import exact_or_refused

PLACES = {"conv": "body.0", "norm": "body.1", "container": "body", "model": ""}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(bias=False), nn.BatchNorm2d(SIZE), nn.ReLU())
        self.head = conv(kernel=1)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x))


def doubled_input(module: nn.Module, args: Any) -> Any:
    return (args[0] * 2,)


def doubled_by_name(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args[0] * 2,), kwargs


def halved_output(module: nn.Module, args: Any, output: Any) -> Any:
    return output / 2


def cut_off(module: nn.Module, args: Any, output: Any) -> None:
    output.data.clamp_(max=0.3)


def centred(module: nn.Module, args: Any) -> None:
    """Changes a child's weights before each call."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.clamp_(-0.1, 0.1)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "pre-hook": lambda module: module.register_forward_pre_hook(doubled_input),
    "pre-hook with kwargs": lambda m: m.register_forward_pre_hook(
        doubled_by_name, with_kwargs=True
    ),
    "hook": lambda module: module.register_forward_hook(halved_output),
    "hook that writes": lambda module: module.register_forward_hook(cut_off),
    "hook on weights": lambda module: module.register_forward_pre_hook(centred),
}


def hooked(place: str, hook: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Net()
        HOOKS[hook](model.get_submodule(PLACES[place]))
        return model

    return make


class Halved(nn.Module):
    def forward(self, weight: Any) -> Any:
        return weight / 2


def parametrized(place: str, make: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        net = Net()
        with torch.no_grad():  # what is made of a weight then can be copied
            make(net.get_submodule(PLACES[place]))
        return net

    return model


def half_of_weight(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Halved())


def full_backward(module: nn.Module) -> None:
    """Doubles the gradient that goes on; outputs stay as they are."""
    module.register_full_backward_hook(lambda m, grads, outs: (grads[0] * 2,))


class KeepsMaps(nn.Module):
    """Features are collected by hooks, and returned by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.maps = nn.Sequential(conv(), nn.BatchNorm2d(SIZE), nn.ReLU()), []
        self.body[0].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.maps.append(output)

    def forward(self, x: Any) -> Any:
        y = self.body(x)
        return y, self.maps.pop()


class HookRunsNorm(Net):
    """A hook on the conv holds the norm, and runs it once more."""

    def __init__(self) -> None:
        super().__init__()
        norm = self.body[1]
        self.head.register_forward_hook(lambda module, args, output: output + norm(args[0]))


class HookByNumber(Net):
    """A hook on a container runs what is in it, by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.body.register_forward_hook(lambda body, args, output: output + body[1](output))


FORMS = {
    **{
        f"{hook} on the {place}": Form(hooked(place, hook))
        for place in PLACES
        for hook in HOOKS
        if place in ("norm", "container") or hook in ("pre-hook", "hook")
    },
    "parametrized conv": Form(parametrized("conv", half_of_weight)),
    "parametrized norm": Form(parametrized("norm", half_of_weight)),
    "weight_norm": Form(parametrized("conv", parametrizations.weight_norm)),
    "spectral_norm": Form(parametrized("conv", parametrizations.spectral_norm)),
    "pruned": Form(parametrized("conv", lambda m: prune.l1_unstructured(m, "weight", 0.5))),
    "pruned norm": Form(parametrized("norm", lambda m: prune.l1_unstructured(m, "weight", 0.5))),
    "weight_norm of old": Form(parametrized("conv", weight_norm)),
    "backward hook on the norm": Form(parametrized("norm", full_backward)),
    "features by hooks": Form(KeepsMaps),
    "hook that holds the norm": Form(HookRunsNorm),
    "hook that runs a child": Form(HookByNumber),
}

test_exact_or_refused = exact_or_refused(FORMS)
