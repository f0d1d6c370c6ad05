"""Takes what a collapsed model gives, with the noise that its precision must have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from orepa_compiler.cli.given.export_request import ExportRequest
from orepa_compiler.export.audit import HALVES
from orepa_compiler.export.int8.dithering import with_int8_noise
from orepa_compiler.export.onnx.inspection import value_names
from orepa_compiler.export.onnx.precision import PRECISIONS, cast, kept_modules, lies_in
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.export.onnx.sizes import other_sizes, resized
from orepa_compiler.export.onnx.writing import export_onnx
from orepa_compiler.export.run.session import PRESET_KEY
from orepa_compiler.quantization.flips import with_flips
from orepa_compiler.quantization.layers import rounded_layers, with_float_maps
from orepa_compiler.verification import Samples, take_samples
from orepa_compiler.verification.evaluation import Side, evaluate

# The calibration batches on which an int8 file is compared with the model.
INT8_BATCHES = 4

Batches = Sequence[tuple[Any, ...]]


def samples_for(
    request: ExportRequest, deploy: nn.Module, given: Batches, *, is_trained: bool
) -> Samples:
    """The samples that every artifact of an export is compared with.

    given: the inputs; calibration data for int8 that was not trained for.
    """
    dtype = PRECISIONS[request.precision]
    second = second_size(request, deploy, given[0]) if request.dynamic_size else []
    is_calibrated = request.precision == "int8" and not is_trained
    batches = given[:INT8_BATCHES] if is_calibrated else given
    if is_trained:
        kept = kept_modules(deploy, request.keep_fp32)
        deploy = with_float_maps(deploy, [p for p in rounded_layers(deploy) if lies_in(p, kept)])
    batches = [*batches, *second]
    samples = take_samples(deploy, batches, precision=dtype, stress=not is_calibrated)
    if is_trained:
        return with_flips(samples, deploy)
    if is_calibrated:
        return _with_int8_noise(request, deploy, samples)
    if request.precision in HALVES and request.keep_fp32:
        return _with_mixed_noise(request, deploy, samples)
    return samples


def preset_advice(onnx: Path) -> str:
    """What to try where a CPU gives other numbers than an int8 file says; "" of another file."""
    said = load_graph(onnx).metadata_props
    if said.get("orepa.precision") != "int8" or said.get(PRESET_KEY) == "cpu":
        return ""
    return (
        "its int8 is for TensorRT, and a CPU without VNNI adds such products in 16 bits, where "
        "they overflow: --int8-preset cpu, or fake_quantize(preset='cpu')"
    )


def second_size(
    request: ExportRequest, deploy: nn.Module, first: tuple[Any, ...]
) -> list[tuple[Any, ...]]:
    """Gives the batch at another height and width, one that the engine takes where one is built."""
    if request.profile is None:
        return [next(other_sizes(deploy, first))]
    names = value_names(load_graph(request.onnx).graph.inputs)
    ranges = request.profile if isinstance(request.profile, dict) else {names[0]: request.profile}
    images = iter(names)

    def sized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        low, _, high = ranges.get(next(images), (leaf.shape,) * 3)
        wanted = low if tuple(leaf.shape[2:]) == tuple(high[2:]) else high
        return resized((leaf,), lambda size: tuple(wanted[2:]))[0]

    return [pytree.tree_map(sized, first)]


def _with_mixed_noise(request: ExportRequest, deploy: nn.Module, samples: Samples) -> Samples:
    """With the noise of the precision that each module really has: all in half may overflow."""
    dtype = PRECISIONS[request.precision]
    kept = kept_modules(deploy, request.keep_fp32)
    mixed = Side("noise of mixed precision", cast(deploy, dtype, keep=kept), dtype)
    noisy = [evaluate(mixed, samples.batches)]
    return replace(samples, truth=replace(samples.truth, noisy=noisy))


def _with_int8_noise(request: ExportRequest, deploy: nn.Module, samples: Samples) -> Samples:
    with TemporaryDirectory() as folder:
        float32 = export_onnx(
            deploy,
            samples.batches[0],
            Path(folder) / "fp32.onnx",
            dynamic_batch=not request.static_batch,
            dynamic_size=request.dynamic_size,
        )
        return with_int8_noise(samples, float32, request.onnx, Path(folder))
