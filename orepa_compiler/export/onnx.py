"""A collapsed model as an ONNX file that is what was asked for, or no file at all."""

from __future__ import annotations

from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.annotation import annotate, name_values
from orepa_compiler.export.artifact import Expected, check_artifact
from orepa_compiler.export.atomic import staged
from orepa_compiler.export.inspection import load_graph
from orepa_compiler.export.progress import announced
from orepa_compiler.export.readiness import Inputs, cast, check_ready, first_batch
from orepa_compiler.export.simplification import simplify_file
from orepa_compiler.export.tracing import (
    count_convs,
    foldable_norms,
    quiet,
    returns_mapping,
    trace,
    train_mode_modules,
)

Precision = Literal["fp32", "fp16", "bf16"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The names of the same types in ONNX.
ELEMENT_TYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}

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
    precision: Precision = "fp32",
    opset: int | None = None,
    simplify: bool = False,
) -> Path:
    """The path of an ONNX file that computes the collapsed `model`.

    inputs: a tensor, a tuple of positional arguments, or a list of such batches; the first batch
    gives the shapes. With dynamic_batch the first axis of every input is the symbol `batch`.
    precision: the type of the weights and of every floating input; the model itself is not
    touched. Outputs are named by the keys of the returned dict, else output, or output_0, ...
    Weights lie in the file, or beside it in PATH.data where they exceed EMBED_LIMIT_BYTES. Every
    node keeps its torch module under the metadata key orepa.module.
    Raises ExportError for a model in train mode, in training form or on the meta device, for a
    path that cannot be written, and where the file would not be what was asked for; MissingPackage
    without onnx and onnxscript, or with simplify without onnxsim and onnxruntime.
    """
    target, opset = Path(path), _checked_opset(opset, precision)
    check_ready(model)
    batch = first_batch(inputs)
    _check_packages(simplify)
    with staged(target) as draft, announced(f"exporting {target.name}") as step:
        step("tracing the model")
        typed = cast(model, PRECISIONS[precision])
        batch = _cast_batch(batch, PRECISIONS[precision])
        program = trace(typed, batch, dynamic_batch=dynamic_batch)
        _check_program(program)
        expected = Expected.of(
            typed,
            program,
            element_type=ELEMENT_TYPES[precision],
            dynamic_batch=dynamic_batch,
            opset=opset,
        )
        step("translating it to ONNX")
        _write(program, draft, expected, _model_properties(model, program, precision))
        step("checking the file")
        check_artifact(draft, expected)
        if simplify:
            step("simplifying the file")
            simplify_file(draft, batch)
            check_artifact(draft, expected)
    return target


def _check_packages(simplify: bool) -> None:
    packages = {"onnx": "onnx", "onnxscript": "onnx"}
    if simplify:
        packages |= {"onnxsim": "simplify", "onnxruntime": "cpu"}
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


def _cast_batch(batch: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    def cast_leaf(leaf: Any) -> Any:
        is_float = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if is_float else leaf

    return pytree.tree_map(cast_leaf, batch)


def _check_program(program: ExportedProgram) -> None:
    training = train_mode_modules(program)
    if training:
        raise ExportError(
            f"runs as in training ({len(training)} such modules); call model.eval() first",
            path=training[0],
        )
    norms = foldable_norms(program)
    if norms:
        # The exporter would fold it in the tensors' own precision; collapse does so in float64.
        raise ExportError(
            f"a BatchNorm straight after a conv ({len(norms)} of them); "
            "call orepa.collapse(model) first",
            path=norms[0],
        )


def _model_properties(model: nn.Module, program: ExportedProgram, precision: str) -> dict[str, str]:
    floats = [tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()]
    try:
        version = metadata.version("orepa-compiler")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "orepa.version": version,
        "orepa.torch_version": torch.__version__,
        "orepa.precision": precision,
        "orepa.model_dtype": str(floats[0]) if floats else "none",
        "orepa.convs": str(count_convs(program)),
        "orepa.outputs": "dict" if returns_mapping(program) else "tensors",
    }


def _write(
    program: ExportedProgram, draft: Path, expected: Expected, properties: dict[str, str]
) -> None:
    onnx = import_extra("onnx", extra="onnx")
    translated = _translate(program, expected.opset)
    name_values(translated.model.graph, expected.outputs)
    weights = translated.model.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    translated.save(draft, external_data=size > EMBED_LIMIT_BYTES)
    graph = load_graph(draft)
    annotate(graph, properties)
    onnx.save(graph, draft)


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
