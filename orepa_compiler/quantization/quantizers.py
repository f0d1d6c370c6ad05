"""torch's fake quantizers, set as the int8 files have it.

    x_int8 = s clamp(round(x / s) + z, low, high) - s z

A kernel has a step s for each output channel and no zero point z, so that a factor for each channel
commutes with the rounding: round(g W) = g round(W) on the step |g| s. It is clamped to -127..127,
as the sign of g may turn it around; on CPUs to -64..64: x86 without VNNI adds two products of uint8
and int8 in 16 bits, which only hold 2 * 255 * 64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)

from orepa_compiler.choices import Preset
from orepa_compiler.errors import ReparamError

PRESETS: tuple[Preset, ...] = ("tensorrt", "cpu")

# The largest integer of a kernel.
LARGEST: dict[Preset, int] = {"tensorrt": 127, "cpu": 64}

# Of too few bits for integers times steps.
HALF_TYPES = (torch.float16, torch.bfloat16)

# How much of a new batch's range goes into that of the maps: torch's default for it.
NEW_RANGE = 0.01

# int8 in TensorRT is symmetric; onnxruntime and OpenVINO on CPUs multiply uint8 by int8.
_MAPS: dict[Preset, dict[str, Any]] = {
    "tensorrt": {
        "dtype": torch.qint8,
        "qscheme": torch.per_tensor_symmetric,
        "quant_min": -128,
        "quant_max": 127,
    },
    "cpu": {
        "dtype": torch.quint8,
        "qscheme": torch.per_tensor_affine,
        "quant_min": 0,
        "quant_max": 255,
    },
}


class Quantizer(FakeQuantize):
    """torch's fake quantizer, which observes in train mode alone, and rounds in float32.

    So eval mode changes no range, and under autocast the steps are what they are without.
    """

    def forward(self, X: Tensor) -> Tensor:
        x = X.float() if X.dtype in HALF_TYPES else X
        if self.training and self.observer_enabled[0] == 1:
            return super().forward(x).to(X.dtype)
        return self.rounded(x).to(X.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """The values on the steps that are known, nothing observed; where it is off, as given."""
        if self.fake_quant_enabled[0] == 0:
            return x
        # torch takes steps in float32, whatever .double() or .half() made of them
        steps, points = self.scale.float(), self.zero_point.int()
        if not self.is_per_channel:
            low, high = self.quant_min, self.quant_max
            return torch.fake_quantize_per_tensor_affine(x, steps, points, low, high)
        return torch.fake_quantize_per_channel_affine(
            x, steps, points, self.ch_axis, self.quant_min, self.quant_max
        )

    def integers(self, x: Tensor) -> Tensor:
        """The int8 values of a kernel, (C_out, ...); its dequantized ones are these times s."""
        steps = self.scale.float().reshape(-1, *(1,) * (x.dim() - 1))
        return (self.rounded(x) / steps).round().to(torch.int8)

    @property
    def is_observing(self) -> bool:
        return bool(self.observer_enabled[0] == 1)

    @property
    def is_ranged(self) -> bool:
        """Whether it has seen values."""
        seen = self.activation_post_process.min_val
        return bool(seen.numel()) and not bool((seen == float("inf")).any())


def weight_quantizer(preset: Preset, weight: Tensor) -> Quantizer:
    """The quantizer of a kernel, (C_out, ...), with its present range.

    Averaged over no past: at each step the range is that of the kernel as it is.
    """
    made = Quantizer(
        MovingAveragePerChannelMinMaxObserver,
        averaging_constant=1.0,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-LARGEST[preset],
        quant_max=LARGEST[preset],
        ch_axis=0,
    )
    made.scale, made.zero_point = torch.ones(len(weight)), torch.zeros(len(weight)).int()
    made.to(weight.device)
    if not weight.is_meta:
        made.train()(weight.detach().float())
    return made


def input_quantizer(preset: Preset, like: Tensor) -> Quantizer:
    """The quantizer of the maps that go into a layer, without a range yet."""
    options = _MAPS[preset]
    made = Quantizer(MovingAverageMinMaxObserver, averaging_constant=NEW_RANGE, **options)
    return made.to(like.device)


def preset_of(quantizer: Quantizer) -> Preset:
    """Which preset the quantizer of a layer's maps is of."""
    return "cpu" if quantizer.dtype == torch.quint8 else "tensorrt"


def check_preset(preset: str) -> None:
    if preset not in PRESETS:
        raise ReparamError(f"preset={preset!r} is not one of {', '.join(PRESETS)}")


def check_range(quantizer: Quantizer, path: str) -> None:
    """Raises ReparamError where maps have no range that a file can be written with."""
    observer = quantizer.activation_post_process
    if not quantizer.is_ranged:
        raise ReparamError(
            "the maps that go into it have no range: none went through in train mode; train it, "
            "or give inputs= to fake_quantize; a layer that the forward does not call is left out "
            f"with where=['!{path}']",
            path=path,
        )
    low, high = float(observer.min_val.min()), float(observer.max_val.max())
    step = quantizer.scale
    if not (torch.isfinite(step).all() and abs(low) < float("inf") and abs(high) < float("inf")):
        raise ReparamError(
            f"the maps that go into it were not finite (from {low:.4g} to {high:.4g}), so they "
            "have no range; look for NaN in the inputs or in what makes these maps",
            path=path,
        )
    if low == high == 0:
        raise ReparamError(
            "the maps that go into it were all 0, which gives no range; give real inputs, or leave "
            f"it in float32 with where=['!{path}']",
            path=path,
        )


def switch(module: nn.Module, *, on: bool) -> None:
    """Lets all quantizers in a module round, or pass values on as they are."""
    for part in module.modules():
        if isinstance(part, Quantizer):
            part.enable_fake_quant(on)


def freeze(module: nn.Module) -> None:
    """Keeps the ranges of all quantizers in a module as they are."""
    for part in module.modules():
        if isinstance(part, Quantizer):
            part.disable_observer()
