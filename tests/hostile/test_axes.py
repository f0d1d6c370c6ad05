"""Layers and constants that act on another axis than the channels, where the sizes coincide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.hostile.forms import SIZE, Form, conv, images
from tests.hostile.judging import exact_or_refused

C = SIZE


class With(nn.Module):
    """Layers by name, and a forward that is given them."""

    def __init__(self, run: Callable[[Any, Any], Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def form(
    run: Callable[[Any, Any], Any], make: Callable[[], dict[str, Any]], *shape: int, **options: Any
) -> Form:
    return Form(lambda: With(run, **make()), inputs=images(*shape) if shape else None, **options)


def scaled(*shape: int, norm: bool = False) -> Form:
    """A conv times a parameter of this shape."""

    def make() -> dict[str, Any]:
        layers: dict[str, Any] = {"conv": conv(), "g": nn.Parameter(torch.rand(shape) + 0.5)}
        return {**layers, "norm": nn.BatchNorm2d(C)} if norm else layers

    def run(m: Any, x: Any) -> Any:
        y = m.conv(x) * m.g
        return m.norm(y) if norm else y

    return form(run, make)


def shifted(*shape: int) -> Form:
    return form(
        lambda m, x: m.norm(m.conv(x) + m.p),
        lambda: {"conv": conv(), "norm": nn.BatchNorm2d(C), "p": nn.Parameter(torch.randn(shape))},
    )


def one_d() -> dict[str, Any]:
    return {
        "conv": nn.Conv1d(C, C, 3, padding=1),
        "linear": nn.Linear(C, C),
        "norm": nn.BatchNorm1d(C),
    }


def two_d() -> dict[str, Any]:
    layers = {"conv": conv(), "second": conv(kernel=1), "norm": nn.BatchNorm2d(C)}
    return {
        **layers,
        "linear": nn.Linear(C, C, bias=False),
        "factor": torch.rand(C, dtype=torch.float64),
    }


def chain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def linear() -> nn.Module:
    return nn.Linear(C, C)


FORMS = {
    "factor (H, 1)": scaled(C, 1),
    "factor (1, H, 1)": scaled(1, C, 1, norm=True),
    "factor (W,), norm": scaled(C, norm=True),
    "factor (N, 1, 1, 1)": scaled(C, 1, 1, 1, norm=True),
    "factor (C, 1, 1)": scaled(C, 1, 1, norm=True),
    "factor ()": scaled(norm=True),
    "factor (H, W)": scaled(C, C, norm=True),
    "position (1, H, 1)": shifted(1, C, 1),
    "position (1, C, 1, 1)": shifted(1, C, 1, 1),
    "linear beside conv1d": form(lambda m, x: m.conv(x) + m.linear(x), one_d, C, C, C),
    "linear beside conv1d, norm": form(
        lambda m, x: m.norm(m.conv(x) + m.linear(x)), one_d, C, C, C
    ),
    "linear, then conv1d": form(lambda m, x: m.conv(m.linear(x)), one_d, C, C, C),
    "conv1d, then linear": form(lambda m, x: m.linear(m.conv(x)), one_d, C, C, C),
    "linear, then norm of tokens": form(lambda m, x: m.norm(m.linear(x)), one_d, C, C, C),
    "norm of tokens, then linear": form(lambda m, x: m.linear(m.norm(x)), one_d, C, C, C),
    "linear over W beside conv": form(lambda m, x: m.norm(m.second(x) + m.linear(x)), two_d),
    "linear of permuted beside conv": form(
        lambda m, x: m.norm(m.second(x) + m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        two_d,
    ),
    "permuted another way back": form(
        lambda m, x: m.norm(m.second(x) + m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 2, 1)),
        two_d,
    ),
    "conv of a transposed map": form(lambda m, x: m.norm(m.conv(x).transpose(1, 2)), two_d),
    "norm over the batch": form(lambda m, x: m.norm(m.conv(x).transpose(0, 1)), two_d),
    "flipped channels": form(lambda m, x: m.norm(m.conv(x).flip(1)), two_d),
    "factor by einsum of W": form(
        lambda m, x: m.norm(torch.einsum("nchw,w->nchw", m.conv(x), m.factor)), two_d
    ),
    "matmul of rows": form(lambda m, x: m.norm(m.conv(x) @ m.linear.weight), two_d),
    "sum of the rows": form(lambda m, x: m.conv(x).sum(2) + m.second(x).sum(3), two_d),
    "crop, unbatched": form(lambda m, x: m.second(m.conv(x)[:, :, 1:-1]), two_d, C, C, C),
    "crop of channels, unbatched": form(
        lambda m, x: m.conv(x)[1:5] + m.second(x)[:4], two_d, C, C, C
    ),
    "split, unbatched": form(
        lambda m, x: torch.cat(torch.split(m.conv(x), 4, 1), 1), two_d, C, C, C
    ),
    "factor, unbatched": form(lambda m, x: m.conv(x) * m.factor.view(-1, 1, 1), two_d, C, C, C),
    "mean of branches, unbatched": form(
        lambda m, x: (m.conv(x) + m.second(x)).mean(1), two_d, C, C, C
    ),
    "conv3d and SyncBatchNorm": Form(
        chain(lambda: nn.Conv3d(C, C, 1), lambda: nn.SyncBatchNorm(C)), inputs=images(2, C, 4, 4, 4)
    ),
    "linear and SyncBatchNorm": Form(
        chain(linear, lambda: nn.SyncBatchNorm(C)), inputs=images(C, C)
    ),
    "linear and SyncBatchNorm of tokens": Form(
        chain(linear, lambda: nn.SyncBatchNorm(C)), inputs=images(C, C, C)
    ),
    "two linears, BatchNorm1d of tokens": Form(
        chain(linear, linear, lambda: nn.BatchNorm1d(C)), inputs=images(C, C, C)
    ),
    "linear, instance norm": Form(
        chain(linear, lambda: nn.InstanceNorm1d(C, affine=True, track_running_stats=True)),
        inputs=images(C, C, C),
    ),
    "flattened, then linear": Form(
        chain(conv, lambda: nn.BatchNorm2d(C), nn.Flatten, lambda: nn.Linear(C**3, C))
    ),
}

test_exact_or_refused = exact_or_refused(FORMS)
