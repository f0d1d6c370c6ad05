"""Arguments that choose the way through a forward: flags, options, names, keywords."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.hostile.forms import SIZE, Form, Pair, conv, images
from tests.hostile.judging import exact_or_refused


def called(*ways: dict[str, Any]) -> tuple[Callable[[nn.Module], Any], ...]:
    """The model as it is called by default, and in each of these ways."""
    return tuple(lambda model, way=way: model(images(), **way) for way in ({}, *ways, {}))


class Features(Pair):
    def forward(self, x: Any, features: bool = False) -> Any:
        y = self.conv(x)
        return y if features else F.relu(self.norm(y))


class KeywordOnly(Pair):
    def forward(self, x: Any, *, normalize: bool = True) -> Any:
        y = self.conv(x)
        return self.norm(y) if normalize else y


class Optional(Pair):
    def forward(self, x: Any, gain: Tensor | None = None) -> Any:
        y = self.conv(x)
        if gain is not None:
            y = y * gain
        return self.norm(y)


class Steps(Pair):
    """The conv runs as often as is asked."""

    def forward(self, x: Any, steps: int = 1) -> Any:
        for _ in range(steps):
            x = self.conv(x)
        return self.norm(x)


class ByName(Pair):
    def forward(self, x: Any, mode: str = "full") -> Any:
        y = self.conv(x)
        match mode:
            case "full":
                return F.relu(self.norm(y))
            case "raw":
                return y
        raise ValueError(mode)


class Popped(Pair):
    def forward(self, x: Any, **options: Any) -> Any:
        y = self.conv(x)
        return y if options.pop("raw", False) else self.norm(y)


class Looked(Pair):
    def forward(self, x: Any, **options: Any) -> Any:
        y = self.conv(x)
        return y if "raw" in options else self.norm(y)


class Got(Pair):
    def forward(self, x: Any, **options: Any) -> Any:
        y = self.conv(x) * options.get("gain", 1.0)
        return self.norm(y)


class Starred(Pair):
    def forward(self, x: Any, *others: Any) -> Any:
        y = self.conv(x)
        return y + others[0] if others else self.norm(y)


class PassedDown(nn.Module):
    """The flag steers a child."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(), Features()

    def forward(self, x: Any, deep: bool = True) -> Any:
        return self.body(self.stem(x), features=not deep)


class PassedAsKeywords(PassedDown):
    def forward(self, x: Any, **options: Any) -> Any:
        return self.body(self.stem(x), **options)


class Collected(Pair):
    """Features before the norm are kept beside the output."""

    def forward(self, x: Any, collect: list[Any] | None = None) -> Any:
        y = self.conv(x)
        if collect is not None:
            collect.append(y)
        y = self.norm(y)
        return (y, list(collect)) if collect is not None else y


class Until(nn.Module):
    """Returns what the chosen stage gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(), nn.BatchNorm2d(SIZE), nn.ReLU(), conv()])

    def forward(self, x: Any, until: int = -1) -> Any:
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == until:
                break
        return x


class TwoFlags(Pair):
    """Only both together skip the norm."""

    def forward(self, x: Any, fast: bool = False, raw: bool = False) -> Any:
        y = self.conv(x)
        return y if fast and raw else self.norm(y)


class InPlaceFlag(Pair):
    def forward(self, x: Any, double: bool = False) -> Any:
        y = self.conv(x)
        if double:
            y.mul_(2)
        return self.norm(y)


class Ordered(Pair):
    """Normalized before the conv or behind it."""

    def forward(self, x: Any, first: bool = False) -> Any:
        return self.conv(self.norm(x)) if first else self.norm(self.conv(x))


class Unconcerned(Pair):
    """The flag does not come near the conv and the norm."""

    def forward(self, x: Any, pooled: bool = False) -> Any:
        y = F.relu(self.norm(self.conv(x)))
        return y.mean((2, 3)) if pooled else y


class OtherMethod(Pair):
    """A second way in, beside forward."""

    def features(self, x: Any) -> Any:
        return self.conv(x)


gain = images(SIZE, 1, 1).exp()
FORMS = {
    "bool": Form(Features, calls=called({"features": True})),
    "keyword only": Form(KeywordOnly, calls=called({"normalize": False})),
    "None": Form(Optional, calls=called({"gain": gain})),
    "count": Form(Steps, calls=called({"steps": 2}, {"steps": 0})),
    "name": Form(ByName, calls=called({"mode": "raw"})),
    "kwargs.pop": Form(Popped, calls=called({"raw": True})),
    "in kwargs": Form(Looked, calls=called({"raw": True})),
    "kwargs.get": Form(Got, calls=called({"gain": 2.0})),
    "*args": Form(
        Starred, calls=(lambda m: m(images()), lambda m: m(images(), 1.0), lambda m: m(images()))
    ),
    "passed down": Form(PassedDown, calls=called({"deep": False})),
    "passed down as kwargs": Form(PassedAsKeywords, calls=called({"features": True})),
    "collected": Form(Collected, calls=(lambda m: m(images()), lambda m: m(images(), collect=[]))),
    "until": Form(Until, calls=called({"until": 0}, {"until": 1})),
    "two flags": Form(TwoFlags, calls=called({"fast": True}, {"fast": True, "raw": True})),
    "written in place": Form(InPlaceFlag, calls=called({"double": True})),
    "order": Form(Ordered, calls=called({"first": True})),
    "unconcerned": Form(Unconcerned, calls=called({"pooled": True}), norms=0, blocks=1),
    "another method": Form(
        OtherMethod, calls=(lambda m: m(images()), lambda m: m.norm(m.features(images())))
    ),
}

test_exact_or_refused = exact_or_refused(FORMS)
