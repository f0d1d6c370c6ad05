"""Layers whose input int8 cannot hold: one scale for all channels, and most channels below it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.export.onnx.precision import lies_in
from orepa_compiler.verification.modes import evaluation_mode
from orepa_compiler.verification.nesting import map_tensors

# int8 holds values up to 127 steps: what is below half a step is 0.
STEPS = 127

# A layer is named where so many of its channels are lost: some are faint in every net.
MOST_LOST = 0.5

_QUANTIZED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class LostChannels:
    """A layer of whose input channels int8 keeps nothing.

    lost, channels: of those that are not 0 anyway. spread: the largest channel over the median one.
    weights: the layer's share of all weights, which keep_fp32 would keep four times as large.
    """

    path: str
    lost: int
    channels: int
    spread: float
    weights: float

    def __str__(self) -> str:
        return (
            f"{self.path}: int8 rounds {self.lost} of {self.channels} input channels to 0 (the "
            f"largest is {self.spread:.0e} times the median one)"
        )


@torch.no_grad()
def lost_channels(
    model: nn.Module, batches: Sequence[tuple[Any, ...]], *, keep: Collection[str] = ()
) -> list[LostChannels]:
    """Finds the layers of which int8, with ranges of these batches, loses most input channels."""
    peaks = input_peaks(model, batches, keep=keep)
    total = sum(weight.numel() for weight in model.parameters()) or 1
    found = [_lost(path, peak, model.get_submodule(path), total) for path, peak in peaks.items()]
    return [layer for layer in found if is_named(layer)]


@torch.no_grad()
def input_peaks(
    model: nn.Module, batches: Sequence[tuple[Any, ...]], *, keep: Collection[str] = ()
) -> dict[str, Tensor]:
    """Measures the largest magnitude of each input channel of convs and linear layers."""
    peaks: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, Any], None]:
        def before(layer: nn.Module, args: Any) -> None:
            x = args[0].detach().abs()
            axis = -1 if isinstance(layer, nn.Linear) else 1
            peak = x.movedim(axis, 0).flatten(1).amax(1).cpu()
            peaks[path] = torch.maximum(peaks[path], peak) if path in peaks else peak

        return before

    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, _QUANTIZED) and not lies_in(path, keep)
    }
    handles = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    try:
        with evaluation_mode(model):
            for batch in batches:
                model(*map_tensors(batch, torch.clone))
    finally:
        for handle in handles:
            handle.remove()
    return peaks


def is_named(layer: LostChannels) -> bool:
    """Whether so many channels are lost that the layer is spoken of."""
    return layer.lost > MOST_LOST * layer.channels


def _lost(path: str, peak: Tensor, layer: nn.Module, total: int) -> LostChannels:
    alive = peak[peak > 0]
    if not len(alive):
        return LostChannels(path, 0, 0, 1.0, 0.0)
    lost = int((alive < alive.max() / (2 * STEPS)).sum())
    spread = float(alive.max() / alive.median())
    weights = sum(weight.numel() for weight in layer.parameters()) / total
    return LostChannels(path, lost, len(alive), spread, weights)


def advice(found: Sequence[LostChannels]) -> str:
    """Says what these layers do to the file, and what keeping them in float32 costs; "" of none."""
    if not found:
        return ""
    paths = ", ".join(repr(layer.path) for layer in found)
    share = sum(layer.weights for layer in found)
    return (
        f"{'; '.join(map(str, found))}. keep_fp32=[{paths}] keeps them in float32: {share:.1%} of "
        "the weights stay four times as large"
    )
