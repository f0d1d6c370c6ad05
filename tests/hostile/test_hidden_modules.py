"""Convs and norms that a forward reaches by another way than their registered names."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from tests.hostile.forms import SIZE, Form, Pair, conv
from tests.hostile.judging import exact_or_refused


class Lists(nn.Module):
    """A pyramid whose convs are registered by name and run from plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = Pair(), nn.BatchNorm2d(SIZE)
        lateral, output = conv(kernel=1), conv()
        self.add_module("lateral3", lateral)
        self.add_module("output3", output)
        self.laterals, self.outputs = [lateral], [output]

    def forward(self, x: Any) -> Any:
        y = self.laterals[0](self.stem(x))
        for layer in self.outputs:
            y = layer(y)
        return self.norm(y)


class Dicts(Lists):
    def __init__(self) -> None:
        super().__init__()
        self.by_level = {"p3": {"lateral": self.laterals[0], "output": self.outputs[0]}}

    def forward(self, x: Any) -> Any:
        layers = self.by_level["p3"]
        return self.norm(layers["output"](layers["lateral"](self.stem(x))))


class NestedLists(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = [[self.conv], [[self.norm]]]

    def forward(self, x: Any) -> Any:
        return F.relu(self.layers[1][0][0](self.layers[0][0](x)))


class Tuples(NestedLists):
    def __init__(self) -> None:
        super().__init__()
        self.layers = ((self.conv,), ((self.norm,), None))


class NormInDict(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.norms = {"train": self.norm}

    def forward(self, x: Any) -> Any:
        return self.norms["train"](self.conv(x))


class InNamespace(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.parts = SimpleNamespace(norm=self.norm, inner=SimpleNamespace(conv=self.conv))

    def forward(self, x: Any) -> Any:
        return self.parts.norm(self.parts.inner.conv(x))


@dataclass
class Parts:
    conv: nn.Module
    norm: nn.Module

    def run(self, x: Any) -> Any:
        return self.norm(self.conv(x))


class InDataclass(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.parts = Parts(self.conv, self.norm)

    def forward(self, x: Any) -> Any:
        return self.parts.run(x)


class InPartial(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.run = functools.partial(self.norm)
        self.run_conv = functools.partial(self.conv.forward)

    def forward(self, x: Any) -> Any:
        return self.run(self.run_conv(x))


class InClosure(Pair):
    def __init__(self) -> None:
        super().__init__()
        norm, made = self.norm, self.conv

        def run(x: Any) -> Any:
            return norm(made(x))

        self.run = run

    def forward(self, x: Any) -> Any:
        return F.relu(self.run(x))


class InLambda(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [lambda x, norm=self.norm: norm(x)]

    def forward(self, x: Any) -> Any:
        return self.steps[0](self.conv(x))


class Hidden(Pair):
    """The norm's second name is no child: object.__setattr__ went around the registration."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "quiet", self.norm)

    def forward(self, x: Any) -> Any:
        return self.quiet(self.conv(x))


class HiddenInSet(Pair):
    """Nothing but a set that is no child's holds the norm's second name."""

    def __init__(self) -> None:
        super().__init__()
        self.held = {self.norm}

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        for norm in self.held if float(y.detach().sum()) < 1e9 else ():
            y = norm(y)
        return y


class OnlyHidden(nn.Module):
    """The conv and its norm are in a list alone: no parameter of the model is theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.layers = conv(), [conv().double(), nn.BatchNorm2d(SIZE).double().eval()]

    def forward(self, x: Any) -> Any:
        return self.head(self.layers[1](self.layers[0](x)))


class BackToParent(nn.Module):
    """A child runs a conv of its parent, through a weak reference."""

    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.parent = nn.BatchNorm2d(SIZE), lambda: None

        def forward(self, x: Any) -> Any:
            return self.norm(self.parent().conv(x))

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.child, self.norm = conv(), self.Child(), nn.BatchNorm2d(SIZE)
        self.child.parent = weakref.ref(self)

    def forward(self, x: Any) -> Any:
        return self.child(x) + self.norm(self.conv(x))


class Property(Pair):
    @property
    def last(self) -> nn.Module:
        return self._modules["norm"]

    def forward(self, x: Any) -> Any:
        return F.relu(self.last(self._modules["conv"](x)))


class Walked(Pair):
    """Runs its children as it finds them."""

    def forward(self, x: Any) -> Any:
        for _, layer in self.named_children():
            x = layer(x)
        return x


class Looked(Pair):
    def forward(self, x: Any) -> Any:
        return self.get_submodule("norm")(getattr(self, "con" + "v")(x))


class OnClass(Pair):
    layers: ClassVar[dict[str, nn.Module]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.layers["norm"] = self.norm

    def forward(self, x: Any) -> Any:
        return self.layers["norm"](self.conv(x))


WORLD: dict[str, nn.Module] = {}


class InGlobal(Pair):
    def __init__(self) -> None:
        super().__init__()
        WORLD["norm"] = self.norm

    def forward(self, x: Any) -> Any:
        return WORLD["norm"](self.conv(x))


class Bound(Pair):
    """A method of a layer, kept and called."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = self.norm.forward

    def forward(self, x: Any) -> Any:
        return F.relu(self.normalise(self.conv(x)))


class Iterated(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.chosen = {self.norm}  # a set

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        for layer in self.chosen:
            y = layer(y)
        return y


FORMS = {
    "pyramid from plain lists": Form(Lists, norms=0, blocks=2),
    "pyramid from a dict of dicts": Form(Dicts, norms=0, blocks=2),
    "nested lists": Form(NestedLists, norms=0, blocks=1),
    "tuples": Form(Tuples, blocks=1),
    "norm in a dict": Form(NormInDict, norms=0, blocks=1),
    "namespace": Form(InNamespace),
    "dataclass": Form(InDataclass),
    "partial": Form(InPartial),
    "closure": Form(InClosure),
    "default of a lambda": Form(InLambda),
    "object.__setattr__": Form(Hidden),
    "in a list alone": Form(OnlyHidden),
    "weak reference to the parent": Form(BackToParent),
    "property": Form(Property, norms=0, blocks=1),
    "named_children": Form(Walked, norms=0, blocks=1),
    "get_submodule": Form(Looked, norms=0, blocks=1),
    "dict of the class": Form(OnClass),
    "dict of the world": Form(InGlobal),
    "bound forward": Form(Bound),
    "set": Form(Iterated),
    "set, in a forward without a graph": Form(HiddenInSet),
}

test_exact_or_refused = exact_or_refused(FORMS)
