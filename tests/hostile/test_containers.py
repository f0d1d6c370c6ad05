"""Norms and convs in containers, and layers that two places share: edits that may overlap."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import nn

from tests.hostile.forms import SIZE, Form, Pair, conv, images
from tests.hostile.judging import exact_or_refused

seq = nn.Sequential


def norm() -> nn.Module:
    return nn.BatchNorm2d(SIZE)


class SharedNorm(nn.Module):
    """Two convs behind which stands one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = conv(), conv(kernel=1), norm()

    def forward(self, x: Any) -> Any:
        return self.norm(self.second(F.relu(self.norm(self.first(x)))))


class NormOfBoth(SharedNorm):
    """The norm of each branch is the same one."""

    def forward(self, x: Any) -> Any:
        return self.norm(self.first(x)) + self.norm(self.second(x))


class NormTwice(Pair):
    def forward(self, x: Any) -> Any:
        return self.norm(self.norm(self.conv(x)))


class ConvTwice(Pair):
    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(self.conv(x)))


class ReadTwice(Pair):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return self.norm(y) + y


class TwoNorms(nn.Module):
    """One conv, and a norm for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = conv(), nn.ModuleList([norm(), norm()])

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return self.norms[0](y), self.norms[1](y)


class TwoInputs(TwoNorms):
    def forward(self, x: Any) -> Any:
        return self.norms[0](self.conv(x)), self.norms[1](self.conv(F.relu(x)))


class Container(nn.Module):
    """The conv is in one child, its norm in another, each in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"conv": seq(seq(conv())), "after": seq(norm(), nn.ReLU())})

    def forward(self, x: Any) -> Any:
        return self.body["after"](self.body["conv"](x))


class Sliced(nn.Module):
    """Parts of a Sequential are run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = seq(conv(), norm(), nn.ReLU(), conv(), norm())

    def forward(self, x: Any) -> Any:
        y = self.layers[:1](x)
        return self.layers[1:](y), y


class SharedContainer(nn.Module):
    """One Sequential of a norm behind two convs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.after = conv(), conv(), seq(norm(), nn.ReLU())

    def forward(self, x: Any) -> Any:
        return self.after(self.second(self.after(self.first(x))))


class Reassigned(nn.Module):
    """Layers have a second name in another container."""

    def __init__(self) -> None:
        super().__init__()
        self.body = seq(conv(), norm(), nn.ReLU(), conv(kernel=1))
        self.stages = nn.ModuleList([self.body[0], self.body[1]])

    def forward(self, x: Any) -> Any:
        y = self.body(x)
        return self.stages[1](self.stages[0](y))


class NormBeforeConv(nn.Module):
    """A norm that both neighbours could take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = conv(), seq(norm()), conv(kernel=1)

    def forward(self, x: Any) -> Any:
        return self.second(self.norm(self.first(x)))


class Indexed(nn.Module):
    """A forward that reads its container's numbers and names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = seq(OrderedDict(conv=conv(), norm=seq(norm()), act=nn.ReLU()))

    def forward(self, x: Any) -> Any:
        for name, layer in self.layers.named_children():
            x = layer[0](x) if name == "norm" else layer(x)
        return x * len(self.layers)


class ClassSteers(nn.Module):
    """A forward that asks which class its child is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after = conv(), norm()

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return self.after(y) if isinstance(self.after, nn.BatchNorm2d) else y * 3


class NoneAllowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv(), norm(), None

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        for layer in (self.norm, self.act):
            y = y if layer is None else layer(y)
        return y


def same_pair_twice() -> nn.Module:
    pair = Pair()
    return seq(pair, pair)


def same_conv_twice() -> nn.Module:
    made = conv()
    return seq(made, norm(), made, norm())


def branches_share() -> nn.Module:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = norm()
            self.first, self.second = seq(conv(), shared), seq(conv(kernel=1), shared)

        def forward(self, x: Any) -> Any:
            return self.first(x) + self.second(x)

    return Branched()


FORMS = {
    "norm in a container": Form(lambda: seq(conv(), seq(norm()), nn.ReLU()), norms=0, blocks=1),
    "norm two deep": Form(lambda: seq(conv(), seq(seq(norm())), nn.ReLU()), norms=0, blocks=1),
    "norm three deep": Form(lambda: seq(conv(), seq(seq(seq(norm()))))),
    "conv in a container": Form(lambda: seq(seq(conv()), norm()), norms=0, blocks=1),
    "both in containers": Form(lambda: seq(seq(seq(conv())), seq(norm())), norms=0, blocks=1),
    "norm and more": Form(lambda: seq(conv(), seq(norm(), nn.ReLU()), conv()), norms=0, blocks=1),
    "two norms": Form(lambda: seq(conv(), seq(norm(), norm())), norms=0, blocks=1),
    "container before": Form(lambda: seq(seq(norm()), nn.Conv2d(SIZE, SIZE, 3)), norms=0),
    "empty containers": Form(lambda: seq(conv(), seq(), nn.Identity(), seq(norm()))),
    "between two convs": Form(NormBeforeConv, norms=0),
    "containers apart": Form(Container, norms=0, blocks=1),
    "shared norm": Form(SharedNorm),
    "shared norm of branches": Form(NormOfBoth),
    "shared in two chains": Form(branches_share),
    "norm twice": Form(NormTwice),
    "conv twice": Form(ConvTwice),
    "read twice": Form(ReadTwice),
    "two norms of a conv": Form(TwoNorms),
    "two norms, two inputs": Form(TwoInputs),
    "sliced": Form(Sliced),
    "shared container": Form(SharedContainer),
    "two names": Form(Reassigned),
    "names and numbers": Form(Indexed),
    "class of a child": Form(ClassSteers),
    "None in a list": Form(NoneAllowed, norms=0, blocks=1),
    "pair twice": Form(same_pair_twice),
    "conv in two places": Form(same_conv_twice),
    "1-d": Form(
        lambda: seq(nn.Conv1d(SIZE, SIZE, 3), seq(nn.BatchNorm1d(SIZE))),
        inputs=images(SIZE, SIZE, SIZE),
        norms=0,
    ),
}

test_exact_or_refused = exact_or_refused(FORMS)
