"""Exported files as callables on torch tensors: what a comparison with the torch model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from orepa_compiler.errors import ExportError, NotRun
from orepa_compiler.export.run.session import (
    first_line,
    open_session,
    placement,
    run_session,
    spec_of,
)
from orepa_compiler.export.run.signature import TensorSpec, match_inputs, text_of
from orepa_compiler.export.tensorrt.flavors import DTYPES, load_engine


class OnnxRunner:
    """An ONNX file in onnxruntime: torch tensors in, torch tensors on the CPU out.

    Called with tensors, by position or by input name, it returns one tensor; or a dict from output
    name to tensor, where the file has several outputs or comes from a model that returns a dict.
    On the CPU, onnxruntime computes float16 convs in float32. placement: how many nodes run on
    which provider. properties: the metadata of the file.
    Raises NotRun where the provider is not there; ExportError where the file cannot be run as
    asked: a provider that fell back to another one, an operator without a kernel, inputs that do
    not fit.
    """

    def __init__(
        self, path: str | PathLike[str], *, provider: str = "CPUExecutionProvider"
    ) -> None:
        self.path, self.provider = Path(path), provider
        self._session = open_session(self.path, provider)
        self.inputs = tuple(spec_of(self.path, item) for item in self._session.get_inputs())
        self.outputs = tuple(spec_of(self.path, item) for item in self._session.get_outputs())
        self.properties: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.placement = placement(self._session)
        self._by_name = len(self.outputs) > 1 or self.properties.get("orepa.outputs") == "dict"

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor | dict[str, Tensor]:
        given = match_inputs(self.path, self.inputs, inputs, named)
        try:
            results = run_session(self._session, self.path, list(given.values()))
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            raise ExportError(f"{self.path}: onnxruntime failed: {first_line(error)}") from error
        return results if self._by_name else results[self.outputs[0].name]


class TensorRTRunner:
    """A TensorRT engine on the GPU: torch tensors in, torch CUDA tensors out.

    It returns one tensor where the engine's only output is called `output`, as export_onnx names a
    lone tensor, and else a dict from output name to tensor.
    Raises NotRun without a GPU; ExportError for an engine that no installed TensorRT can load, and
    for inputs that do not fit.
    """

    def __init__(self, engine_path: str | PathLike[str]) -> None:
        self.path = Path(engine_path)
        if not self.path.is_file():
            raise ExportError(f"{self.path}: no such file; write it with orepa.build_engine(...)")
        self._device = _gpu(self.path)
        self._tensorrt, self._engine = load_engine(str(self.path), self.path.read_bytes())
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ExportError(f"{self.path}: TensorRT has no memory to run the engine")
        self.inputs = self._specs(self._tensorrt.TensorIOMode.INPUT)
        self.outputs = self._specs(self._tensorrt.TensorIOMode.OUTPUT)

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor | dict[str, Tensor]:
        given = match_inputs(self.path, self.inputs, inputs, named)
        # TensorRT gets addresses only, so the tensors are held until it is done.
        held = {k: tensor.detach().to(self._device).contiguous() for k, tensor in given.items()}
        for name, tensor in held.items():
            self._bind(name, tensor)
        results = {spec.name: self._allocate(spec) for spec in self.outputs}
        with _stream(self._device) as handle:
            if not self._context.execute_async_v3(handle):
                raise ExportError(f"{self.path}: TensorRT could not run the engine")
        return results["output"] if results.keys() == {"output"} else results

    def _specs(self, mode: object) -> tuple[TensorSpec, ...]:
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return tuple(self._spec(name) for name in names if engine.get_tensor_mode(name) == mode)

    def _spec(self, name: str) -> TensorSpec:
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in DTYPES:
            raise ExportError(f"{self.path}: {name} has type {dtype}, which torch does not know")
        return TensorSpec(name, tuple(self._engine.get_tensor_shape(name)), DTYPES[dtype])

    def _bind(self, name: str, tensor: Tensor) -> None:
        if not self._context.set_input_shape(name, tuple(tensor.shape)):
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
            raise ExportError(
                f"{self.path}: input {name} has shape {text_of(tensor.shape)}, outside the "
                f"engine's range {text_of(low)} to {text_of(high)}; build it with shapes=..."
            )
        self._context.set_tensor_address(name, tensor.data_ptr())

    def _allocate(self, spec: TensorSpec) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if any(size < 0 for size in shape):
            raise ExportError(
                f"{self.path}: the shape of output {spec.name} depends on values; only shapes that "
                "follow from the input shapes can be run"
            )
        result = torch.empty(shape, dtype=spec.dtype, device=self._device)
        self._context.set_tensor_address(spec.name, result.data_ptr())
        return result


def _gpu(path: Path) -> torch.device:
    if not torch.cuda.is_available():
        raise NotRun(
            f"{path}: device numerics: not run; torch sees no CUDA GPU here. Run it on a machine "
            "with one, with a torch built for CUDA"
        )
    return torch.device("cuda")


@contextmanager
def _stream(device: torch.device) -> Iterator[int]:
    """Opens a stream that starts after the work so far, and waits for it at the end."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    yield stream.cuda_stream
    stream.synchronize()
