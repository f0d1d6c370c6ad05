"""Fake-quantize: layers round their kernel and their maps to int8, as the exported file will."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from orepa_compiler.algebra.classifiers import is_conv_like
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import Capture
from orepa_compiler.choices import Preset
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.quantization.carrying import without_ranges
from orepa_compiler.quantization.layers import ROUNDED, Rounded, rounded, rounded_layers
from orepa_compiler.quantization.quantizers import (
    HALF_TYPES,
    check_preset,
    input_quantizer,
    weight_quantizer,
)
from orepa_compiler.rewriting.selection import Where, selection
from orepa_compiler.rewriting.swapping import exchange

_OWN_FORWARD = "its forward is not torch's, so what it does with a rounded kernel is not known"


@dataclass(frozen=True)
class FakeQuantize:
    """Every conv, linear layer and squeezed block whose deployed kernel is there while it trains.

    preset: as in `quantizers`. where: which of them. reasons: path -> why one is left in float32,
    for those whose kernel the collapse makes another of.
    """

    preset: Preset = "tensorrt"
    where: Where = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    name: str = "fake_quantize"
    training: None = None
    preserves: frozenset[str] = frozenset()

    def plan(self, capture: Capture) -> Plan:
        edits: list[Edit] = []
        refusals: list[Refusal] = []
        is_selected = selection(self.where)
        blocks = {p for p, m in capture.skeleton.named_modules() if isinstance(m, ConvBlock)}
        for path, layer in capture.skeleton.named_modules():
            inside = any(path.startswith(f"{block}.") for block in blocks)
            if inside or isinstance(layer, Rounded) or not _multiplies(layer):
                continue
            reason = _refusal(layer) or self.reasons.get(path) or capture.hook_refusal(path)
            if not is_selected(path, layer):
                reason = "not selected by where"
            if reason:
                refusals.append(Refusal(self.name, path, type(layer).__name__, reason))
            else:
                edits.append(self._edit(path, layer))
        return Plan(tuple(edits), tuple(refusals))

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        for edit in plan.edits:
            layer = model.get_submodule(edit.path)
            if type(layer) not in ROUNDED:
                raise ReparamError(
                    f"the plan does not fit: it rounds a layer, here is a {type(layer).__name__}",
                    path=edit.path,
                )
            preset = edit.option("preset")
            check_preset(preset)
            kernel = layer.operator().weight if isinstance(layer, ConvBlock) else layer.weight
            assert isinstance(kernel, Tensor)
            quantizers = input_quantizer(preset, kernel), weight_quantizer(preset, kernel)
            model = exchange(model, layer, rounded(layer, *quantizers))
        return model, plan

    def _edit(self, path: str, layer: nn.Module) -> Edit:
        size = sum(p.numel() for p in layer.parameters())
        name = type(layer).__name__
        return Edit(
            *(self.name, path, name, f"{name} in int8", (size, size)),
            options={"preset": self.preset},
        )


@dataclass(frozen=True)
class DropRanges:
    """Layers that round nothing, in the place of those that round."""

    name: str = "drop_ranges"
    training: None = None
    preserves: frozenset[str] = frozenset()

    def plan(self, capture: Capture) -> Plan:
        sizes = {
            path: sum(p.numel() for p in layer.parameters())
            for path, layer in rounded_layers(capture.skeleton).items()
        }
        return Plan(
            tuple(Edit(self.name, path, "int8", "float", (n, n)) for path, n in sizes.items())
        )

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        return without_ranges(model), plan


def _multiplies(layer: nn.Module) -> bool:
    return isinstance(layer, (ConvBlock, nn.Linear)) or is_conv_like(layer)


def _refusal(layer: nn.Module) -> str | None:
    if type(layer) not in ROUNDED or "forward" in vars(layer):
        return f"{type(layer).__name__}: {_OWN_FORWARD}"
    halves = [p.dtype for p in layer.parameters() if p.dtype in HALF_TYPES]
    if halves:
        return (
            f"its parameters are {halves[0]}, which does not hold integers times steps; train "
            "model.float(), under autocast"
        )
    return None
