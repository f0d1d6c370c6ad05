"""Writes a collapsed model as an ONNX file that is what was asked for, or writes no file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.choices import Preset
from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError, Int8RangeWarning
from orepa_compiler.export.gates.artifact import Expected, check_artifact
from orepa_compiler.export.gates.counting import Counts, check_counts
from orepa_compiler.export.gates.readiness import Inputs, check_ready, first_batch, norm_left_reason
from orepa_compiler.export.int8.integers import check_integers
from orepa_compiler.export.int8.quantization import (
    calibration_batches,
    check_quantized,
    quantize_file,
)
from orepa_compiler.export.int8.ranges import advice, lost_channels
from orepa_compiler.export.int8.trained import (
    TrainedLayer,
    trained_layers,
    trained_preset,
    write_trained,
)
from orepa_compiler.export.onnx.annotation import annotate, name_values
from orepa_compiler.export.onnx.external_data import remove_stale, write_external
from orepa_compiler.export.onnx.precision import (
    ELEMENT_TYPES,
    PRECISIONS,
    Precision,
    cast,
    cast_tensors,
    kept_modules,
)
from orepa_compiler.export.onnx.program import (
    foldable_norms_in_program,
    quiet,
    returns_mapping,
    trace_program,
    train_mode_modules,
)
from orepa_compiler.export.onnx.simplification import simplify_file
from orepa_compiler.export.onnx.sizes import check_images, check_other_sizes, check_traced
from orepa_compiler.export.onnx.weight_record import record_weights
from orepa_compiler.export.onnx.widening import REFUSED_IN_BF16, widen
from orepa_compiler.export.run.session import PRESET_KEY
from orepa_compiler.files.atomic import real_target, staged
from orepa_compiler.naming import problem
from orepa_compiler.progress import announced
from orepa_compiler.proving.certificate import CERTIFICATE_KEY, Certificate
from orepa_compiler.quantization.carrying import without_ranges
from orepa_compiler.quantization.quantizers import PRESETS
from orepa_compiler.verification.nesting import tensors_in

# torch's exporter writes operator set 18 and converts upwards from there; 20 is its own default.
OLDEST_OPSET = 18
DEFAULT_OPSET = 20
# The first operator set in which Conv takes bfloat16.
BF16_OPSET = 22

# A protobuf message ends at 2 GiB; the graph around the weights needs its share.
EMBED_LIMIT_BYTES = 1_800_000_000


def export_onnx(
    model: nn.Module,
    inputs: Inputs,
    path: str | PathLike[str],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    precision: Precision = "fp32",
    opset: int | None = None,
    simplify: bool = False,
    certificate: Certificate | None = None,
    keep_fp32: str | Iterable[str] = (),
    calibration: Sequence[Any] | None = None,
    int8_preset: Preset | None = None,
) -> Path:
    """Writes an ONNX file that computes the collapsed `model`.

        orepa.export_onnx(deploy, images, "net.onnx")

    inputs: a tensor, a tuple of positional arguments, or a list of such batches; the first batch
    gives the shapes. With dynamic_batch the first axis of every input is the symbol `batch`; with
    dynamic_size the axes behind the channels of every image (4 axes, or 5) are the symbols `height`
    and `width`: the model, what was traced of it and the file are tried at other sizes, and refused
    where they differ. input_names, output_names: what the file calls them, in the order of the
    arguments and of what is returned; by default inputs have the names of forward's arguments.
    precision: the type of the weights and of every floating input; the model itself is not
    touched; int8 stands for Q/DQ nodes around what multiplies, with ranges taken on the batches of
    `calibration`, or with those that the model was trained with (fake_quantize). keep_fp32: globs
    on module paths that stay in float32, with casts at their borders. Outputs are named by the keys
    of the returned dict, else output, or output_0, ... Weights lie in the file, or beside it in
    PATH.HASH.data where they exceed EMBED_LIMIT_BYTES; a process killed meanwhile leaves the old
    files or the new ones. Every node keeps its torch module under the metadata key orepa.module,
    and the file a hash of each weight. certificate: of the collapse, to be kept in the file too.
    int8_preset: "tensorrt" (default) or "cpu", for onnxruntime and OpenVINO: uint8 maps, kernels of
    7 bits, and all operators that they run in integers; a trained model has its own.
    Raises ExportError for a model in train mode, in training form or on the meta device, for a
    path that cannot be written, and where the file would not be what was asked for; MissingPackage
    without onnx and onnxscript, or with simplify without onnxsim and onnxruntime.
    """
    target, opset = Path(path), _checked_opset(opset, precision)
    real = real_target(target)
    check_ready(model)
    batch, dtype, kept = first_batch(inputs), PRECISIONS[precision], kept_modules(model, keep_fp32)
    trained = _trained(model, precision, calibration, kept)
    preset = _checked_preset(int8_preset, precision, trained)
    if trained is not None:
        model = without_ranges(value_copy(model))
    wants_data = precision == "int8" and trained is None
    batches = calibration_batches(calibration, batch) if wants_data else []
    inputs_, outputs_ = _checked_names(batch, input_names, output_names)
    if dynamic_size:
        check_images(batch)
    _check_packages(simplify or dynamic_size or precision == "int8", simplify)
    with staged(target) as draft, announced(f"exporting {target.name}") as step:
        step("tracing the model")
        if dynamic_size:
            step("trying other sizes")
            check_traced(model, batch, dynamic_batch=dynamic_batch)
        typed, own = cast(model, dtype, keep=kept), batch
        batch = cast_tensors(batch, dtype)
        program = trace_program(
            typed, batch, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size
        )
        _check_program(model, program)
        expected = Expected.of(
            typed,
            program,
            element_type=ELEMENT_TYPES[precision],
            dynamic_batch=dynamic_batch,
            opset=opset,
            kept=kept,
            inputs=inputs_,
            output_names=outputs_,
            dynamic_size=dynamic_size,
        )
        step("translating it to ONNX")
        properties = _model_properties(model, program, precision, kept)
        if precision == "int8":
            properties[PRESET_KEY] = preset
        if certificate is not None:
            properties[CERTIFICATE_KEY] = certificate.to_json()
        expected = replace(expected, counts=_write(program, draft, expected, properties))
        if simplify:
            step("simplifying the file")
            check_artifact(draft, expected)
            simplify_file(draft, batch)
        if trained is not None:
            step("writing the trained ranges")
            check_artifact(draft, expected)
            write_trained(draft, trained.layers)
            check_quantized(draft, trained=trained.layers, preset=trained.preset)
            check_integers(draft, trained.layers)
        elif precision == "int8":
            step(f"calibrating on {len(batches)} batches")
            check_artifact(draft, expected)
            quantize_file(draft, batches, keep=kept, preset=preset)
        step("checking the file")
        record_weights(draft)
        check_artifact(draft, expected)
        if dynamic_size and precision != "bf16":  # which onnxruntime has no kernels for
            check_other_sizes(draft, model, own, precision=precision)
    remove_stale(real)
    if said := advice(lost_channels(typed, batches, keep=kept)):
        warnings.warn(f"{target}: {said}", Int8RangeWarning, stacklevel=2)
    return target


@dataclass(frozen=True)
class _Trained:
    layers: dict[str, TrainedLayer]
    preset: Preset


def _trained(
    model: nn.Module, precision: str, calibration: Sequence[Any] | None, kept: Sequence[str]
) -> _Trained | None:
    """Collects what a model was trained with for int8; None where it does not round."""
    preset = trained_preset(model)
    if preset is None:
        return None
    if precision != "int8":
        raise ExportError(
            f"the model was trained to round to int8; pass precision='int8' and not {precision!r}, "
            "or orepa.drop_ranges(model)"
        )
    if calibration:
        raise ExportError(
            "the model has the ranges that it was trained with, and calibration= would give it "
            "others; leave it out, or call orepa.drop_ranges(model)"
        )
    return _Trained(trained_layers(model, keep=kept), preset)


def _checked_preset(asked: str | None, precision: str, trained: _Trained | None) -> Preset:
    if asked is not None and precision != "int8":
        raise ExportError(f"int8_preset={asked!r} is for precision='int8', not {precision!r}")
    own = "tensorrt" if trained is None else trained.preset
    if trained is not None and asked not in (None, own):
        raise ExportError(
            f"the model was trained for int8 on {own!r}, not {asked!r}; leave out int8_preset="
        )
    if asked not in (None, *PRESETS):
        raise ExportError(f"int8_preset={asked!r} is not one of {', '.join(PRESETS)}")
    return asked or own


def _checked_names(
    batch: tuple[Any, ...], inputs: Sequence[str] | None, outputs: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Checks the names that were given, none where none were; ExportError for impossible ones."""
    given = {"input_names": inputs, "output_names": outputs}
    for option, names in given.items():
        if isinstance(names, str):
            raise ExportError(f"{option}={names!r} is one text; give a list of names")
        if names is not None and not names:
            raise ExportError(f"{option} holds no name; leave it out")
        if said := problem(tuple(names or ()), tuple(inputs or ()) if names is outputs else ()):
            raise ExportError(f"{option}: {said}")
    tensors = len(list(tensors_in(batch)))
    if inputs is not None and len(inputs) != tensors:
        raise ExportError(
            f"input_names: {len(inputs)} names ({', '.join(inputs)}) for {tensors} inputs; give "
            "one for each tensor, in the order of forward's arguments"
        )
    return tuple(inputs or ()), tuple(outputs or ())


def _check_packages(runs: bool, simplify: bool) -> None:
    packages = {"onnx": "onnx", "onnx_ir": "onnx", "onnxscript": "onnx"}
    packages |= {"onnxruntime": "cpu"} if runs else {}
    packages |= {"onnxsim": "simplify"} if simplify else {}
    for package, extra in packages.items():
        import_extra(package, extra=extra)


def _checked_opset(opset: int | None, precision: str) -> int:
    if precision not in PRECISIONS:
        raise ExportError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    oldest = BF16_OPSET if precision == "bf16" else OLDEST_OPSET
    if opset is not None and opset < oldest:
        raise ExportError(
            f"opset={opset} is too old for {precision}; pass opset={oldest} or newer, or none"
        )
    return opset or max(oldest, DEFAULT_OPSET)


def _check_program(model: nn.Module, program: ExportedProgram) -> None:
    training = train_mode_modules(program)
    if training:
        raise ExportError(
            f"runs as in training ({len(training)} such modules); call model.eval() first",
            path=training[0],
        )
    norms = foldable_norms_in_program(program)
    if norms:
        # The exporter would fold it in the tensors' own precision; collapse does so in float64.
        raise ExportError(norm_left_reason(model, norms[0], len(norms)), path=norms[0])


def _model_properties(
    model: nn.Module, program: ExportedProgram, precision: str, kept: Sequence[str]
) -> dict[str, str]:
    floats = [tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()]
    try:
        version = metadata.version("orepa-compiler")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "orepa.version": version,
        "orepa.torch_version": torch.__version__,
        "orepa.precision": precision,
        "orepa.keep_fp32": " ".join(kept),
        "orepa.model_dtype": str(floats[0]) if floats else "none",
        "orepa.outputs": "dict" if returns_mapping(program) else "tensors",
    }


def _write(
    program: ExportedProgram, draft: Path, expected: Expected, properties: dict[str, str]
) -> Counts:
    """Writes the file and counts what it holds; ExportError where that is more than was traced."""
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    translated = _translate(program, expected.opset)
    model = translated.model
    if not len(model.graph):
        raise ExportError("the translated graph holds no nodes: forward returns what it was given")
    name_values(model.graph, expected.outputs, expected.inputs)
    weights = model.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    if size > EMBED_LIMIT_BYTES:
        write_external(model, draft)
    # The program that torch translated: its own pooling, for one, is many sums in there already.
    check_counts(
        Counts.of_graph(model, translated=True), Counts.of_program(translated.exported_program)
    )
    counts = Counts.of_graph(model)
    annotate(model, properties | counts.properties(), expected.modules)
    if expected.element_type == "BFLOAT16":
        widen(model, REFUSED_IN_BF16, keep=expected.kept)
    onnx_ir.save(model, draft)
    return counts


def _translate(program: ExportedProgram, opset: int) -> Any:
    try:
        with quiet():
            return torch.onnx.export(
                program, dynamo=True, optimize=True, verbose=False, opset_version=opset
            )
    except torch.onnx.OnnxExporterError as error:
        causes = [line for line in str(error).splitlines() if line.startswith("<class ")]
        cause = causes[0].partition(">: ")[2] if causes else str(error).splitlines()[0]
        raise ExportError(
            f"torch.onnx.export failed: {cause.strip()} Change that part of the model's forward"
        ) from error
