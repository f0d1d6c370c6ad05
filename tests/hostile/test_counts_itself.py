"""Forwards that look at what they are made of: a rewrite changes what they see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.hostile.forms import Form, Pair, images
from tests.hostile.judging import exact_or_refused


def scaled_by(number: Callable[[Pair], float]) -> Callable[[], nn.Module]:
    class Scaled(Pair):
        def forward(self, x: Any) -> Any:
            return self.norm(self.conv(x)) * torch.tensor(float(number(self)))

    return Scaled


class FilledWithCount(Pair):
    def forward(self, x: Any) -> Any:
        count = sum(parameter.numel() for parameter in self.parameters())
        return self.norm(self.conv(x)) * torch.full((1,), float(count), dtype=x.dtype)


class TakesItsNorm(Pair):
    """The first call takes the norm away."""

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return self._modules.pop("norm")(y) if "norm" in self._modules else y


class DeletesItsNorm(Pair):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        if not hasattr(self, "norm"):
            return y
        norm = self.norm
        del self.norm
        return norm(y)


class TrainsAll(Pair):
    """Puts each of its modules into train mode, those that are not its own too."""

    def forward(self, x: Any) -> Any:
        for module in self.modules():
            module.training = True
        return self.norm(self.conv(x))


class Freezes(Pair):
    def forward(self, x: Any) -> Any:
        self.norm.requires_grad_(False)
        return self.norm(self.conv(x))


SEEN: dict[str, Callable[[Pair], float]] = {
    "modules": lambda model: len(list(model.modules())),
    "parameters": lambda model: sum(p.numel() for p in model.parameters()),
    "text": lambda model: len(repr(model)),
    "class of a child": lambda model: 3 if isinstance(model.norm, nn.BatchNorm2d) else 2,
    "keys": lambda model: len(model.state_dict()),
}
ONCE = (lambda model: model(images()), lambda model: model(images()))
FORMS = {
    **{name: Form(scaled_by(number)) for name, number in SEEN.items()},
    "a tensor filled": Form(FilledWithCount),
    "norm taken away": Form(TakesItsNorm, calls=ONCE),
    "norm deleted": Form(DeletesItsNorm, calls=ONCE),
    "all set to train": Form(TrainsAll),
    "norm frozen": Form(Freezes),
}

test_exact_or_refused = exact_or_refused(FORMS)
