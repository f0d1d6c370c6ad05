"""OpenVINO on the CPU: a file of its own, and a runner of that or of an ONNX file."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.run.session import first_line, to_numpy
from orepa_compiler.export.run.signature import TensorSpec, match_inputs
from orepa_compiler.files.atomic import staged

# OpenVINO's names of types.
_DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "boolean": torch.bool,
}

# Without these a CPU with bfloat16 units computes a float32 file in bfloat16.
_HONEST = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}


def write_openvino(onnx_path: str | PathLike[str], path: str | PathLike[str]) -> Path:
    """Writes OpenVINO's own file (.xml, its weights in .bin beside it) of an ONNX file.

        orepa.write_openvino("net.onnx", "net.xml")

    The weights keep their type. The .bin is put in its place before the .xml that names it.
    Raises ExportError for a path that does not end in .xml, and where OpenVINO cannot read the
    file or the folder cannot be written; MissingPackage without OpenVINO.
    """
    target = Path(path)
    if target.suffix != ".xml":
        raise ExportError(f"{target}: OpenVINO's files end in .xml; name it so")
    openvino = import_extra("openvino", extra="openvino")
    with TemporaryDirectory() as folder:
        draft = Path(folder) / target.name
        try:
            openvino.save_model(_read(Path(onnx_path)), draft, compress_to_fp16=False)
        except RuntimeError as error:
            raise ExportError(f"{onnx_path}: OpenVINO: {first_line(error)}") from error
        for made in (draft.with_suffix(".bin"), draft):
            with staged(target.with_name(made.name)) as place:
                place.write_bytes(made.read_bytes())
    return target


class OpenVINORunner:
    """OpenVINO's file, or an ONNX file, on the CPU: torch tensors in, torch tensors out.

    It computes in the file's own precision. properties: the metadata of the ONNX file, which
    OpenVINO's keeps. It returns one tensor where the only output is called `output`, as export_onnx
    names a lone tensor, and else a dict from output name to tensor.
    Raises ExportError for a file that OpenVINO cannot read or run, and for inputs that do not fit;
    MissingPackage without OpenVINO.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        openvino = import_extra("openvino", extra="openvino")
        model = _read(self.path)
        try:
            self._compiled = openvino.Core().compile_model(model, "CPU", _HONEST)
        except RuntimeError as error:
            raise ExportError(f"{self.path}: OpenVINO: {first_line(error)}") from error
        self.inputs = tuple(_spec(self.path, port) for port in self._compiled.inputs)
        self.outputs = tuple(_spec(self.path, port) for port in self._compiled.outputs)
        self.properties = _properties(model)

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor | dict[str, Tensor]:
        given = match_inputs(self.path, self.inputs, inputs, named)
        try:
            values = self._compiled({name: to_numpy(tensor) for name, tensor in given.items()})
        except RuntimeError as error:
            raise ExportError(f"{self.path}: OpenVINO failed: {first_line(error)}") from error
        results = {
            spec.name: torch.from_numpy(values[index].copy())
            for index, spec in enumerate(self.outputs)
        }
        return results["output"] if results.keys() == {"output"} else results


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    openvino = import_extra("openvino", extra="openvino")
    try:
        return openvino.Core().read_model(os.fspath(path))
    except RuntimeError as error:
        raise ExportError(f"{path}: OpenVINO cannot read it: {_reason(error)}") from error


def _properties(model: Any) -> dict[str, str]:
    if not model.has_rt_info("framework"):
        return {}
    held = model.get_rt_info("framework").get()
    return {key: model.get_rt_info(["framework", key]).astype(str) for key in held}


def _reason(error: RuntimeError) -> str:
    """OpenVINO's message without the places in its source that it begins with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("Exception from")), repr(error))


def _spec(path: Path, port: Any) -> TensorSpec:
    """Describes an input or output; an open axis is a symbol of its own, the first one `batch`."""
    kind = port.get_element_type().get_type_name()
    if kind not in _DTYPES:
        raise ExportError(
            f"{path}: {port.get_any_name()} has type {kind}, which is not read here; export fp32 "
            "or fp16"
        )
    shape = tuple(
        axis.get_length() if axis.is_static else ("batch" if index == 0 else f"axis_{index}")
        for index, axis in enumerate(port.get_partial_shape())
    )
    return TensorSpec(port.get_any_name(), shape, _DTYPES[kind])
