"""What is found before and behind a conv."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orepa_compiler.capture import Capture, capture
from orepa_compiler.defaults.following import ACTIVATION, NORM, followed_by, reads_pooled
from orepa_compiler.passes import is_leaf


class Net(nn.Module):
    """A conv, and a forward made of what a test hands in."""

    def __init__(self, behind: Callable[[Net, Tensor], object], *layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.other = nn.Conv2d(4, 4, 1)
        self.layer = layers[0] if layers else nn.Identity()
        self.second = layers[1] if len(layers) > 1 else nn.Identity()
        self.behind = behind

    def forward(self, x: Tensor) -> object:
        return self.behind(self, x)


def captured(model: nn.Module) -> Capture:
    return capture(model, training=True, is_leaf=is_leaf)


class Permute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Inner(nn.Module):
    """A composite whose first layer is the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


FOLLOWED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "norm": (lambda: Net(lambda n, x: n.layer(n.conv(x)), nn.BatchNorm2d(4)), NORM),
    "group norm": (lambda: Net(lambda n, x: n.layer(n.conv(x)), nn.GroupNorm(2, 4)), NORM),
    "functional norm": (lambda: Net(lambda n, x: F.layer_norm(n.conv(x), (3, 3))), NORM),
    "activation": (lambda: Net(lambda n, x: n.layer(n.conv(x)), nn.SiLU()), ACTIVATION),
    "functional activation": (lambda: Net(lambda n, x: F.gelu(n.conv(x))), ACTIVATION),
    "activation method": (lambda: Net(lambda n, x: n.conv(x).relu()), ACTIVATION),
    "behind permute": (
        lambda: Net(lambda n, x: n.layer(n.conv(x).permute(0, 2, 3, 1)), nn.LayerNorm(4)),
        NORM,
    ),
    "behind a permute layer": (
        lambda: Net(lambda n, x: n.second(n.layer(n.conv(x))), Permute(), nn.LayerNorm(4)),
        NORM,
    ),
    "behind pooling and dropout": (
        lambda: Net(
            lambda n, x: n.second(F.max_pool2d(n.layer(n.conv(x)), 2)),
            nn.Dropout(),
            nn.BatchNorm2d(4),
        ),
        NORM,
    ),
    "behind cat": (
        lambda: Net(lambda n, x: n.layer(torch.cat([n.conv(x), n.other(x)], 1)), nn.BatchNorm2d(8)),
        NORM,
    ),
    "behind an upsampling": (
        lambda: Net(
            lambda n, x: n.second(F.interpolate(n.layer(n.conv(x)), scale_factor=2)),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.BatchNorm2d(4),
        ),
        NORM,
    ),
    "behind what moves channels into space": (
        lambda: Net(lambda n, x: n.second(n.layer(n.conv(x))), nn.PixelShuffle(2), nn.PReLU()),
        ACTIVATION,
    ),
    "nothing behind what moves channels": (
        lambda: Net(lambda n, x: n.layer(n.conv(x)), nn.PixelShuffle(2)),
        "its output is the model's",
    ),
    "closed, for a conv": (
        lambda: Net(lambda n, x: n.other(n.second(n.layer(n.conv(x)))), nn.Tanh(), nn.AvgPool2d(2)),
        ACTIVATION,
    ),
    "closed, for a conv and as a gate": (
        lambda: Net(lambda n, x: n.other(s := n.layer(n.conv(x))) * s, nn.Sigmoid()),
        "followed by the gate Sigmoid",
    ),
    "closed, and the output": (
        lambda: Net(lambda n, x: n.layer(n.conv(x)), nn.Tanh()),
        "followed by the gate Tanh",
    ),
    "inside a composite": (lambda: Net(lambda n, x: n.layer(n.conv(x)), Inner()), NORM),
    "outside of its owner": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
        NORM,
    ),
    "several norms": (
        lambda: Net(lambda n, x: n.layer(c := n.conv(x)) + n.second(c), Inner(), nn.BatchNorm2d(4)),
        NORM,
    ),
    "several consumers": (
        lambda: Net(lambda n, x: n.layer(c := n.conv(x)) + c, nn.BatchNorm2d(4)),
        "several consumers: followed by add, norm",
    ),
    "a read of its shape is no consumer": (
        lambda: Net(lambda n, x: n.layer(c := n.conv(x)).reshape(c.size(0), -1), nn.BatchNorm2d(4)),
        NORM,
    ),
    "a read of its dtype is no consumer": (
        lambda: Net(lambda n, x: n.layer(c := n.conv(x)).to(c.dtype), nn.BatchNorm2d(4)),
        NORM,
    ),
    "output": (lambda: Net(lambda n, x: n.conv(x)), "its output is the model's"),
    "one of several outputs": (
        lambda: Net(lambda n, x: {"a": n.conv(x), "b": x}),
        "its output is the model's",
    ),
    "gate": (
        lambda: Net(lambda n, x: x * n.layer(n.conv(x)), nn.Sigmoid()),
        "followed by the gate Sigmoid",
    ),
    "functional gate": (
        lambda: Net(lambda n, x: x * n.conv(x).sigmoid()),
        "followed by the gate sigmoid",
    ),
    "conv": (lambda: Net(lambda n, x: n.other(n.conv(x))), "followed by a conv"),
    "layer": (
        lambda: Net(lambda n, x: n.layer(n.conv(x)), nn.Flatten()),
        "followed by Flatten",
    ),
    "nothing": (lambda: Net(lambda n, x: (n.conv(x), x)[1]), "nothing reads its output"),
    "never called": (lambda: Net(lambda n, x: x + 1), "nothing reads its output"),
}


@pytest.mark.parametrize(("make", "expected"), FOLLOWED.values(), ids=FOLLOWED)
def test_followed_by(make: Callable[[], nn.Module], expected: str) -> None:
    model = make()
    path = "conv" if isinstance(model, Net) else "0.0"
    assert followed_by(captured(model), path) == expected


def test_a_value_that_leaves_a_module_in_a_tuple_is_not_followed() -> None:
    net = captured(nn.Sequential(Net(lambda n, x: (n.conv(x), x)), nn.Identity()))
    assert followed_by(net, "0.conv") == "it is returned as one of several values"


def gate(pool: Callable[[Net, Tensor], Tensor]) -> Callable[[], Net]:
    return lambda: Net(lambda n, x: x * n.conv(pool(n, x)).sigmoid(), nn.AdaptiveAvgPool2d(1))


POOLED: dict[str, Callable[[], Net]] = {
    "module": gate(lambda n, x: n.layer(x)),
    "max": lambda: Net(lambda n, x: x * n.conv(n.layer(x)), nn.AdaptiveMaxPool2d((1, 1))),
    "behind conv and act": gate(lambda n, x: F.relu(n.other(n.layer(x)))),
    "functional": gate(lambda n, x: F.adaptive_avg_pool2d(x, 1)),
    "functional, by keyword": gate(lambda n, x: F.adaptive_avg_pool2d(x, output_size=(1, 1))),
    "mean method": gate(lambda n, x: x.mean((2, 3), keepdim=True)),
    "mean method, by keyword": gate(lambda n, x: x.mean(dim=(-2, -1), keepdim=True)),
    "mean, positional": gate(lambda n, x: x.mean([2, 3], True)),
    "torch.mean": gate(lambda n, x: torch.mean(x, (2, 3), keepdim=True)),
}
NOT_POOLED: dict[str, Callable[[], Net]] = {
    "input": gate(lambda n, x: x),
    "pooled to more": lambda: Net(lambda n, x: n.conv(n.layer(x)), nn.AdaptiveAvgPool2d(2)),
    "functional to more": gate(lambda n, x: F.adaptive_avg_pool2d(x, 7)),
    "behind another layer": gate(lambda n, x: n.second(n.layer(x).expand(-1, -1, 7, 7))),
    "max pooling": gate(lambda n, x: F.max_pool2d(x, 2)),
    "mean over channels": gate(lambda n, x: x.mean(1, keepdim=True)),
    "mean over channels, by keyword": gate(lambda n, x: torch.mean(x, dim=1, keepdim=True)),
    "mean over one axis": gate(lambda n, x: x.mean(3, keepdim=True)),
    "two branches": gate(lambda n, x: n.layer(x) + x),
}


@pytest.mark.parametrize("make", POOLED.values(), ids=POOLED)
def test_reads_pooled(make: Callable[[], Net]) -> None:
    assert reads_pooled(captured(make()), "conv")


@pytest.mark.parametrize("make", NOT_POOLED.values(), ids=NOT_POOLED)
def test_does_not_read_pooled(make: Callable[[], Net]) -> None:
    assert not reads_pooled(captured(make()), "conv")


def test_pooled_across_a_module_border() -> None:
    excite = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid())
    net = captured(nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(1)), excite))
    assert reads_pooled(net, "1.0")
    assert reads_pooled(net, "1.2")
    assert followed_by(net, "1.0") == ACTIVATION
    assert followed_by(net, "1.2") == "followed by the gate Sigmoid"


def test_a_conv_that_nobody_calls_reads_nothing() -> None:
    assert not reads_pooled(captured(Net(lambda n, x: x + 1)), "conv")
