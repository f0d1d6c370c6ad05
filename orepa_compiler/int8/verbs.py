"""Defines the verbs of int8 training: fake_quantize, freeze_ranges and drop_ranges."""

from __future__ import annotations

from torch import nn

from orepa_compiler.choices import Preset
from orepa_compiler.generation.store import no_kernel_kept
from orepa_compiler.int8.training import check_rounds, observe, quantized
from orepa_compiler.passes import (
    Pipeline,
)
from orepa_compiler.passes.fake_quantize import DropRanges
from orepa_compiler.planning import record_plan
from orepa_compiler.preconditions import (
    check_inputs,
    check_model,
    check_unrounded,
    check_values,
)
from orepa_compiler.quantization.quantizers import check_preset, check_range, freeze
from orepa_compiler.rewriting.selection import Where
from orepa_compiler.running import Inputs, copy_model, record_forwards
from orepa_compiler.verification.evaluation import (
    batches_of,
)


def fake_quantize(
    model: nn.Module,
    *,
    preset: Preset = "tensorrt",
    where: Where = None,
    inputs: Inputs = None,
    inplace: bool = False,
) -> nn.Module:
    """Makes layers round to int8 as the exported file will, to be trained so.

        model = orepa.fake_quantize(model, inputs=images)

    y = conv(Q_x(x), Q_W(W_e)) + b, with torch's fake quantizers: Q_W symmetric, a step for each
    output channel, on the kernel that the branches make; Q_x one step for all of the maps

    The norm that is folded in later scales the steps of Q_W, and changes no integer. Ranges follow
    the model in train mode until freeze_ranges; eval mode changes none. collapse carries them over,
    and export_onnx(precision="int8") writes them without calibration.

    preset: "tensorrt" for symmetric maps in int8, "cpu" for maps in uint8 with a zero point, as
    onnxruntime and OpenVINO multiply them. where: which layers; the others stay in float32. inputs:
    a batch, or a list of them, on which the maps get their first ranges. inplace: rewrite the model
    itself, whose optimizer goes on. Layers that are not rounded are in recorded_plans(model)[-1],
    each with the reason.
    Raises ReparamError for a model that rounds already, and where no layer can be rounded.
    """
    check_model(model, also_linear=True)
    check_unrounded(model, "fake_quantize")
    check_inputs(inputs)
    check_preset(preset)
    check_values(model, "there is no kernel to take a range of; load the weights first")
    with no_kernel_kept():
        recording = record_forwards(model, inputs)
        target = model if inplace else copy_model(model)
        target, applied = quantized(target, recording, preset=preset, where=where)
        if inputs is not None:
            observe(target, batches_of(inputs))
    record_plan(target, applied)
    return target


def freeze_ranges(model: nn.Module) -> nn.Module:
    """Keeps the int8 ranges as they are, in place: training goes on beneath them.

        orepa.freeze_ranges(model)  # for the last epochs

    Call it for the last part of the training, when the ranges have settled.
    Raises ReparamError for a model that does not round, and for a layer without a range: no maps
    went through it, they were not finite, or all of them were 0.
    """
    for path, layer in check_rounds(model).items():
        check_range(layer.input_quantizer, path)
    freeze(model)
    return model


def drop_ranges(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Takes the rounding to int8 away: gives the layers that fake_quantize found, as trained since.

        model = orepa.drop_ranges(model)

    Of a collapsed model the kernels stay rounded, and the maps are no longer.
    Raises ReparamError for a model that does not round.
    """
    check_rounds(model)
    target, applied = Pipeline((DropRanges(),)).run(model if inplace else copy_model(model))
    record_plan(target, applied)
    return target
