"""Measures what int8 without training loses, module by module, and what each way out gives."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf, log10
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.int8.equalizing import equalize
from orepa_compiler.int8.training import observe
from orepa_compiler.int8.verbs import fake_quantize
from orepa_compiler.quantization.layers import Rounded, rounded_layers
from orepa_compiler.verification.evaluation import Batch, batches_of, evaluation_mode
from orepa_compiler.verification.nesting import map_tensors

# How many of the worst modules are tried in float32.
WORST = 3

ONE_STEP, EACH_CHANNEL, EQUALIZED = "one step per kernel", "a step per channel", "equalized"


@dataclass(frozen=True)
class ModuleLoss:
    """One layer in int8, fed with what it gets in float: signal to noise of its output, in dB.

    by_form: by the form of the int8 net; a form in which it has no other kernel has the same dB.
    """

    path: str
    by_form: Mapping[str, float]


@dataclass(frozen=True)
class WholeLoss:
    """The whole net in int8: signal to noise of its output in dB, the share of equal top-1."""

    form: str
    signal: float
    top1: float | None


@dataclass(frozen=True, repr=False)
class Int8Loss:
    """What int8 without training loses. modules: the worst first. notes: what was not tried."""

    modules: tuple[ModuleLoss, ...]
    wholes: tuple[WholeLoss, ...]
    notes: tuple[str, ...] = ()
    worst: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """Names the worst modules and what each form of the whole net has left, in one line."""
        modules = self.modules[: len(self.worst)]
        worst = [f"{one.path} {one.by_form[EACH_CHANNEL]:.0f} dB" for one in modules]
        wholes = [f"{whole.form} {whole.signal:.0f} dB" for whole in self.wholes]
        return f"int8 loses most in {', '.join(worst)}; of the whole net: {'; '.join(wholes)}"

    def to_dict(self) -> dict[str, Any]:
        """Gives all of it as plain values that json.dumps takes."""
        return asdict(self)

    def __rich__(self) -> Group:
        names = list(self.modules[0].by_form)
        modules = _table("module, alone in int8 (dB)", names)
        for one in self.modules:
            modules.add_row(one.path, *(f"{one.by_form[name]:.1f}" for name in names))
        wholes = _table("the whole net in int8", ["dB", "same top-1"])
        for whole in self.wholes:
            top1 = "-" if whole.top1 is None else f"{whole.top1:.2%}"
            wholes.add_row(whole.form, f"{whole.signal:.1f}", top1)
        return Group(wholes, Text(), modules, *(Text(f"note: {note}") for note in self.notes))

    def __str__(self) -> str:
        page = io.StringIO()
        Console(file=page, width=120, force_terminal=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def _table(first: str, others: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


@torch.no_grad()
def int8_loss(model: nn.Module, calibration: Any, *, worst: int = WORST) -> Int8Loss:
    """Measures what int8 with ranges from `calibration` would lose, before any file is written.

        print(orepa.int8_loss(deploy, calibration_batches))

    For each layer that multiplies: 10 log10 (signal / noise) of its output, where it alone is in
    int8. For the whole net: the same of its output, and how often its top-1 is that of the float
    net, with one step for each kernel, with a step for each output channel (what export_onnx
    writes), equalized, and with the `worst` modules in float32 (keep_fp32).

    model: collapsed. calibration: a batch, or a list of them. Raises ReparamError as fake_quantize
    and equalize do; that a net cannot be equalized is a note.
    """
    batches = batches_of(calibration)
    forms, notes = {}, []
    forms[EACH_CHANNEL] = _in_int8(model, batches)
    forms[ONE_STEP] = _with_one_step(_in_int8(model, batches))
    try:
        float_forms = {EQUALIZED: equalize(model, calibration)}
        forms[EQUALIZED] = _in_int8(float_forms[EQUALIZED], batches)
    except ReparamError as error:
        float_forms = {}
        notes.append(f"not equalized: {error}")
    order = [form for form in (ONE_STEP, EACH_CHANNEL, EQUALIZED) if form in forms]
    alone = {
        name: _module_losses(float_forms.get(name, model), forms[name], batches) for name in order
    }
    paths = sorted(alone[EACH_CHANNEL], key=alone[EACH_CHANNEL].__getitem__)
    modules = tuple(ModuleLoss(p, {name: alone[name][p] for name in order}) for p in paths)
    expected = _outputs(model, batches)
    wholes = [_whole(name, forms[name], batches, expected) for name in order]
    lost = paths[:worst]
    if lost and len(lost) < len(paths):
        kept = _in_int8(model, batches, where=[f"!{path}" for path in lost])
        name = f"a step per channel, keep_fp32={lost}"
        wholes.append(_whole(name, kept, batches, expected))
    return Int8Loss(modules, tuple(wholes), tuple(notes), tuple(lost))


def _in_int8(model: nn.Module, batches: list[Batch], **options: Any) -> nn.Module:
    made = fake_quantize(model, **options).eval()
    observe(made, batches, widest=True)
    return made


def _with_one_step(model: nn.Module) -> nn.Module:
    for layer in rounded_layers(model).values():
        steps = layer.weight_quantizer.scale
        steps.fill_(steps.max())
    return model


def _module_losses(model: nn.Module, int8: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Measures in dB what each layer that rounds loses, on what it gets in the float model."""
    sums: dict[str, list[float]] = {}

    def watch(path: str, layer: Rounded) -> Callable[[nn.Module, Any, Tensor], None]:
        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            noise = (layer(args[0]) - output).double().square().sum().item()
            signal = output.double().square().sum().item()
            old = sums.get(path, [0.0, 0.0])
            sums[path] = [old[0] + signal, old[1] + noise]

        return after

    handles = [
        model.get_submodule(path).register_forward_hook(watch(path, layer))
        for path, layer in rounded_layers(int8).items()
    ]
    try:
        _outputs(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return {path: _decibels(*pair) for path, pair in sums.items()}


def _outputs(model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    with evaluation_mode(model):
        found = [model(*map_tensors(batch, Tensor.clone)) for batch in batches]
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()]


def _whole(form: str, model: nn.Module, batches: list[Batch], expected: list[Tensor]) -> WholeLoss:
    found = _outputs(model, batches)
    pairs = list(zip(expected, found, strict=True))
    signal = sum(right.double().square().sum().item() for right, _ in pairs)
    noise = sum((right - ours).double().square().sum().item() for right, ours in pairs)
    same = [
        (right.argmax(1) == ours.argmax(1)).double().flatten()
        for right, ours in pairs
        if right.dim() > 1 and right.shape[1] > 1
    ]
    top1 = torch.cat(same).mean().item() if same else None
    return WholeLoss(form, _decibels(signal, noise), top1)


def _decibels(signal: float, noise: float) -> float:
    if not signal:
        return 0.0
    return 10 * log10(signal / noise) if noise else inf
