"""Arithmetic whose type is not the map's: bytes, halves, ints, and factors of another width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.hostile.forms import SIZE, Branches, Form, Pair, conv, images
from tests.hostile.judging import exact_or_refused

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def whole(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 120, shape, generator=generator).to(dtype)


def before(change: Callable[[Any], Any], c_in: int = 3, *, branches: bool = False) -> Any:
    """A pair, or two branches, behind this change of the input."""

    def make() -> nn.Module:
        model = (Branches if branches else Pair)()
        if branches:
            model.large, model.small = conv(c_in), conv(c_in, kernel=1)
        else:
            model.conv = conv(c_in)
        kind = type(model)

        class Changed(kind):  # type: ignore[misc, valid-type]
            def forward(self, x: Any) -> Any:
                return super().forward(change(x))

        model.__class__ = Changed
        return model

    return make


def between(change: Callable[[Any, Any], Any], **layers: Any) -> Any:
    class Between(Pair):
        def __init__(self) -> None:
            super().__init__()
            for name, make in layers.items():
                setattr(self, name, make())

        def forward(self, x: Any) -> Any:
            return self.norm(change(self, self.conv(x)))

    return Between


def single(make: Callable[[], nn.Module], inputs: Any, **options: Any) -> Form:
    return Form(make, inputs=inputs, double=False, **options)


BYTES = whole(SIZE, 3, SIZE, SIZE)
GREY = images(SIZE, 1, SIZE, SIZE).float()
COLOUR = images(SIZE, 3, SIZE, SIZE).float()
HALF = images(SIZE, 3, SIZE, SIZE).half()


def half_of(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().half()


class ToSingle(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.float()


class ToDouble(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.double()


class Within(Pair):
    """The conv runs under autocast, the norm does not."""

    def forward(self, x: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x)
        return self.norm(y.float())


FORMS = {
    "bytes / 255": single(before(lambda x: x / 255), BYTES, norms=0, told=True),
    "bytes.float() / 255": single(before(lambda x: x.float() / 255), BYTES, norms=0, told=True),
    "bytes / 255, two branches": single(
        before(lambda x: x / 255, branches=True), BYTES, norms=0, told=True
    ),
    "bytes - mean": single(before(lambda x: (x / 255 - MEAN) / STD), BYTES),
    "bytes * 2, which wrap": single(
        before(lambda x: (x * 2).float()), whole(SIZE, 3, SIZE, SIZE) + 30
    ),
    "bytes // 2": single(before(lambda x: (x // 2).float()), BYTES),
    "negative bytes": single(before(lambda x: (-x).float() / 99), BYTES),
    "int / 3, cut off": single(
        before(lambda x: torch.div(x, 3, rounding_mode="floor").float()),
        whole(SIZE, 3, SIZE, SIZE, dtype=torch.int64),
    ),
    "mask": single(before(lambda x: x * (x > 0)), COLOUR),
    "grey minus a mean of three": single(before(lambda x: x - MEAN), GREY),
    "grey, two branches": single(before(lambda x: (x - MEAN) / STD, branches=True), GREY),
    "colour, mean and std": single(before(lambda x: (x - MEAN) / STD), COLOUR, norms=0, blocks=1),
    "colour, two branches": single(
        before(lambda x: (x - MEAN) / STD, branches=True), COLOUR, norms=0
    ),
    "two colours of one": single(before(lambda x: x[:, :1] * MEAN), COLOUR),
    "half conv, then single": single(
        half_of(between(lambda m, y: (y * MEAN.new_full((SIZE, 1, 1), 1.1)).half())),
        images().half(),
    ),
    "single conv, double factor": single(
        between(lambda m, y: y * torch.full((SIZE, 1, 1), 1.1, dtype=torch.float64).to(y)),
        images().float(),
    ),
    "double buffer beside": single(
        between(
            lambda m, y: (y * m.g).float(), g=lambda: nn.Buffer(torch.rand(SIZE, 1, 1).double())
        ),
        images().float(),
    ),
    "through half": single(between(lambda m, y: y.half().float()), images().float()),
    "type_as": single(between(lambda m, y: y.type_as(m.conv.weight)), images().float()),
    "conv in half, norm in single": single(
        lambda: nn.Sequential(conv().half(), ToSingle(), nn.BatchNorm2d(SIZE)), images().half()
    ),
    "conv in double, norm in single": single(
        lambda: nn.Sequential(conv().double(), ToSingle(), nn.BatchNorm2d(SIZE)), images()
    ),
    "complex": single(
        between(lambda m, y: (torch.view_as_complex(torch.stack([y, y], -1)) * 1j).real * -1),
        images().float(),
    ),
    "quantized by hand": single(
        between(lambda m, y: torch.fake_quantize_per_tensor_affine(y, 0.1, 0, -8, 7)),
        images().float(),
    ),
    "autocast within": single(Within, images().float()),
}


test_exact_or_refused = exact_or_refused(FORMS)
