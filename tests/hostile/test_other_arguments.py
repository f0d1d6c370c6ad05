"""Other arguments that steer: enums, tuples, functions, "not given", **kwargs as a whole."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.hostile.forms import Form, Pair, images
from tests.hostile.judging import exact_or_refused
from tests.hostile.test_steering_arguments import called

NOT_GIVEN = object()


class Mode(enum.Enum):
    FULL = "full"
    RAW = "raw"


class ByMode(Pair):
    def forward(self, x: Any, mode: Mode = Mode.FULL) -> Any:
        y = self.conv(x)
        return self.norm(y) if mode is Mode.FULL else y


class ByLayers(Pair):
    def forward(self, x: Any, layers: tuple[int, ...] = (0, 1)) -> Any:
        for number, layer in enumerate((self.conv, self.norm)):
            x = layer(x) if number in layers else x
        return x


class ByOptions(Pair):
    def forward(self, x: Any, options: dict[str, Any] = {}) -> Any:  # noqa: B006
        y = self.conv(x)
        return y if options.get("raw") else self.norm(y)


class ByGiven(Pair):
    def forward(self, x: Any, raw: Any = NOT_GIVEN) -> Any:
        y = self.conv(x)
        return self.norm(y) if raw is NOT_GIVEN else y


def unchanged(x: Any) -> Any:
    return x


class ByFunction(Pair):
    def forward(self, x: Any, between: Callable[[Any], Any] = unchanged) -> Any:
        return self.norm(between(self.conv(x)))


class ByType(Pair):
    """A list of maps is another thing than a batch."""

    def forward(self, x: Tensor | list[Tensor]) -> Any:
        return self.conv(x[0]) if isinstance(x, list) else self.norm(self.conv(x))


@dataclass(slots=True)
class Sample:
    image: Tensor
    scale: Tensor


class BySlots(Pair):
    """Its argument keeps its tensors where no __dict__ shows them."""

    def forward(self, sample: Sample) -> Any:
        return self.norm(self.conv(sample.image * sample.scale))


def sample(scale: float) -> Sample:
    return Sample(images(), torch.tensor(scale, dtype=torch.float64))


class Unconcerned(Pair):
    """Takes several kinds of arguments, and goes one way with all of them."""

    def forward(self, x: Any, mode: Mode = Mode.FULL, scales: tuple[float, ...] = (1.0,)) -> Any:
        x = torch.stack(x) if isinstance(x, (list, tuple)) else x
        y = self.norm(self.conv(x))
        return y.relu() if mode is Mode.FULL else y


def reading(chooses: Callable[[dict[str, Any]], Any]) -> Callable[[], nn.Module]:
    class Reading(Pair):
        def forward(self, x: Any, **options: Any) -> Any:
            y = self.conv(x)
            return y if chooses(options) else self.norm(y)

    return Reading


class PassesOn(Pair):
    def chosen(self, y: Any, raw: bool = False) -> Any:
        return y if raw else self.norm(y)

    def forward(self, x: Any, **options: Any) -> Any:
        return self.chosen(self.conv(x), **options)


WHOLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "any at all": lambda options: options,
    "equality": lambda options: options != {},
    "merged": lambda options: ({"raw": False} | options)["raw"],
    "starred": lambda options: {"raw": False, **options}["raw"],
    "keys": lambda options: "raw" in options.keys(),  # noqa: SIM118
    "values": lambda options: any(options.values()),
    "copied": lambda options: dict(options).get("raw"),
    "setdefault": lambda options: options.setdefault("raw", False),
    "attributes": lambda options: getattr(SimpleNamespace(**options), "raw", False),
}
FORMS = {
    "enum": Form(ByMode, calls=called({"mode": Mode.RAW})),
    "tuple": Form(ByLayers, calls=called({"layers": (0,)})),
    "dict": Form(ByOptions, calls=called({"options": {"raw": True}})),
    "not given": Form(ByGiven, calls=called({"raw": None})),
    "function": Form(ByFunction, calls=called({"between": torch.tanh})),
    "list": Form(ByType, calls=(lambda m: m(images()), lambda m: m([images()]))),
    "slots": Form(
        BySlots,
        inputs=(sample(1.0),),
        calls=(lambda m: m(sample(1.0)), lambda m: m(sample(2.0))),
    ),
    "unconcerned": Form(
        Unconcerned,
        calls=(lambda m: m(images()), lambda m: m(list(images()), Mode.RAW, (2.0,))),
        norms=0,
        blocks=1,
    ),
    **{
        f"**kwargs, {name}": Form(reading(chooses), calls=called({"raw": True}))
        for name, chooses in WHOLE.items()
    },
    "**kwargs, passed on": Form(PassesOn, calls=called({"raw": True})),
}

test_exact_or_refused = exact_or_refused(FORMS)
