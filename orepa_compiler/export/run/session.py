"""onnxruntime sessions with honest settings, and torch tensors in and out of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError, NotRun
from orepa_compiler.export.onnx.external_data import check_external, load_external
from orepa_compiler.export.onnx.reading import load_graph, to_message
from orepa_compiler.export.run.signature import TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}

# TF32 rounds float32 to 10 bits; the other two pick kernels by timing, or another layout.
_CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT", "prefer_nhwc": "0"}

# onnxruntime then remembers which provider runs which node.
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
_ERRORS_ONLY = 3
# Q/DQ nodes then stay, and what is between them runs in float32. Its int8 kernels for a CPU without
# VNNI add two products in 16 bits, which does not hold those of a file for TensorRT.
_AS_WRITTEN = "session.disable_quant_qdq"

# The key under which an int8 file says what it is for.
PRESET_KEY = "orepa.int8_preset"

# What has to run where it was asked to: all else moves data, or costs nothing.
_HEAVY = ("Conv", "Gemm", "MatMul")

# A protobuf message ends at 2 GiB.
_MOST_BYTES = 2**31 - 1


def open_session(path: Path, provider: str) -> Any:
    """Opens an onnxruntime InferenceSession whose convs and matrix products all run on `provider`.

    Raises NotRun where the provider is not there, or has no bfloat16; ExportError where the file
    cannot be read, and where the provider fell back to another one.
    """
    onnxruntime = import_extra("onnxruntime", extra="cpu")
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise NotRun(
            f"{provider} is not in the installed onnxruntime ({', '.join(available)})"
            + _how_to_install(provider)
        )
    model = load_graph(path)
    check_external(path, model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
    if _is_for_tensorrt(model):
        options.add_session_config_entry(_AS_WRITTEN, "1")
    settings = _CUDA_OPTIONS if provider == "CUDAExecutionProvider" else {}
    try:
        session = onnxruntime.InferenceSession(
            path.resolve(), options, providers=[(provider, settings)]
        )
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        raise _unreadable(path, provider, model, error) from error
    check_provider(session, provider)
    return session


def _is_for_tensorrt(model: ir.Model) -> bool:
    """Whether a file has int8 in the form that TensorRT takes: it is to be judged as it is."""
    said = model.metadata_props
    return said.get("orepa.precision") == "int8" and said.get(PRESET_KEY, "tensorrt") == "tensorrt"


def plain_session(path: Path, model: ir.Model) -> Any:
    """Opens a session on the CPU that runs `model`, with its weights beside `path`, as written.

    Raises ExportError where onnxruntime cannot load it.
    """
    onnxruntime = import_extra("onnxruntime", extra="cpu")
    load_external(path, model)
    message = to_message(model)
    if message.ByteSize() > _MOST_BYTES:
        raise ExportError(f"{path}: too large to look into ({message.ByteSize()} bytes)")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            message.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        raise _unreadable(path, "CPUExecutionProvider", model, error) from error


def run_session(session: Any, path: Path, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Runs a session, and gives every output by name, on tensors in the order of its inputs."""
    names = [item.name for item in session.get_inputs()]
    arrays = [to_numpy(tensor) for tensor in tensors]
    pairs = zip(names, arrays, tensors, strict=True)
    feeds = {name: to_ortvalue(array, tensor.dtype) for name, array, tensor in pairs}
    outputs = [spec_of(path, item) for item in session.get_outputs()]
    values = session.run_with_ort_values(None, feeds)
    return {
        spec.name: from_ortvalue(value, spec.dtype)
        for spec, value in zip(outputs, values, strict=True)
    }


def check_provider(session: Any, provider: str) -> None:
    """Raises ExportError where a session runs what costs time elsewhere than on `provider`."""
    actual = session.get_providers()
    if actual[0] != provider:
        raise ExportError(
            f"onnxruntime fell back from {provider} to {actual[0]}" + _how_to_install(provider)
        )
    if provider == "CPUExecutionProvider":
        return
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise ExportError(
            f"this onnxruntime cannot tell which nodes ran on {provider}; install a newer one"
        )
    for part in session.get_provider_graph_assignment_info():
        strays = [n.name for n in part.get_nodes() if any(word in n.op_type for word in _HEAVY)]
        if part.ep_name != provider and strays:
            raise ExportError(
                f"onnxruntime runs {len(strays)} convs or matrix products on {part.ep_name}, not "
                f"on {provider}: {strays[0]}"
            )


def placement(session: Any) -> dict[str, int]:
    """Counts how many nodes run on which provider; empty where onnxruntime does not tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


def _how_to_install(provider: str) -> str:
    names = {dist.metadata["Name"] for dist in metadata.distributions()}
    if {"onnxruntime", "onnxruntime-gpu"} <= names:
        # Both own the folder onnxruntime/, so whichever came last has overwritten the other.
        return (
            "; onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of them"
        )
    if provider == "CUDAExecutionProvider":
        return "; for a GPU: pip uninstall onnxruntime, then pip install 'orepa-compiler[gpu]'"
    return ""


def _unreadable(path: Path, provider: str, model: ir.Model, error: Exception) -> ExportError:
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    reason = first_line(error)
    weights = model.graph.initializers.tensors()
    if any(tensor.dtype == onnx_ir.DataType.BFLOAT16 for tensor in weights):
        return NotRun(
            f"{path}: not run: {provider} lacks bfloat16 kernels ({reason}); export with "
            "precision='fp32' or 'fp16' to compare in onnxruntime"
        )
    return ExportError(f"{path}: onnxruntime cannot load the file: {reason}")


def first_line(error: Exception) -> str:
    """Shortens an error's message to one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def spec_of(path: Path, item: Any) -> TensorSpec:
    """Describes an input or output of a session; ExportError where torch has no such type."""
    if item.type not in _DTYPES:
        raise ExportError(f"{path}: {item.name} is a {item.type}, which torch does not know")
    shape = tuple("?" if axis is None else axis for axis in item.shape)
    return TensorSpec(item.name, shape, _DTYPES[item.type])


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Gives the tensor's values; bfloat16, which numpy does not have, as its bits."""
    host = tensor.detach().cpu().contiguous()
    return host.view(torch.uint16).numpy() if host.dtype == torch.bfloat16 else host.numpy()


def to_ortvalue(array: np.ndarray, dtype: torch.dtype) -> Any:
    """Makes an OrtValue over the array, which must outlive it."""
    value = import_extra("onnxruntime", extra="cpu").OrtValue
    if dtype != torch.bfloat16:
        return value.ortvalue_from_numpy(array)
    bfloat16 = import_extra("onnx_ir", extra="onnx").DataType.BFLOAT16.value
    return value.ortvalue_from_numpy_with_onnx_type(array, bfloat16)


def from_ortvalue(value: Any, dtype: torch.dtype) -> Tensor:
    """Makes a torch tensor with the OrtValue's values."""
    return (
        from_dlpack(value).clone() if dtype == torch.bfloat16 else torch.from_numpy(value.numpy())
    )
