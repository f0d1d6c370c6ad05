"""Makes a side of `orepa verify` of a torch model, an ONNX file or a TensorRT engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from orepa_compiler.choices import ENGINES, OPENVINO, Weights
from orepa_compiler.cli.given.models import load_source
from orepa_compiler.cli.given.options import SIDES as SIDES
from orepa_compiler.cli.given.options import NotVerified
from orepa_compiler.compiler import collapse
from orepa_compiler.errors import ExportError, MissingPackage, NotRun, ReparamError
from orepa_compiler.export.latency import example_inputs
from orepa_compiler.export.run.openvino import OpenVINORunner
from orepa_compiler.export.run.runners import OnnxRunner, TensorRTRunner
from orepa_compiler.progress import announced

FILES = (".onnx", OPENVINO, *ENGINES)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def load_side(
    source: str,
    checkpoint: Path | None,
    *,
    inputs: tuple[Tensor, ...],
    allow_pickle: bool,
    weights: Weights | None = None,
) -> Callable[..., Any]:
    """One side of a comparison.

    source: an ONNX file runs in onnxruntime, on the CPU or, with @cuda, on the GPU; an engine runs
    on the GPU; a model is loaded as load_source does, and collapsed with @collapsed.
    Raises what load_source raises, and NotVerified where what is needed to run it is not here.
    """
    name, form = _split(source)
    if not name.endswith(FILES):
        model: nn.Module = load_source(
            name,
            checkpoint,
            inputs=inputs,
            allow_pickle=allow_pickle,
            weights=weights if checkpoint else None,
        )
        if form != "collapsed":
            _refuse(source, form)
            return model
        with announced(f"collapsing {name}"):
            return collapse(model, inputs=inputs)
    check_checkpoint(source, checkpoint)
    try:
        if name.endswith(ENGINES):
            _refuse(source, form)
            return TensorRTRunner(Path(name))
        if name.endswith(OPENVINO) or form == "openvino":
            _refuse(source, form if name.endswith(OPENVINO) else "")
            return OpenVINORunner(Path(name))
        if form not in ("", *PROVIDERS):
            _refuse(source, form)
        return OnnxRunner(Path(name), provider=PROVIDERS[form or "cpu"])
    except (MissingPackage, NotRun) as error:
        reason = str(error)
        raise NotVerified(reason if name in reason else f"{source}: {reason}") from error


def check_checkpoint(source: str, checkpoint: Path | None) -> None:
    """Raises ReparamError for a checkpoint of an exported file."""
    name, _ = _split(source)
    if checkpoint is not None and name.endswith(FILES):
        raise ReparamError(f"{source}: an exported file holds its weights; leave out {checkpoint}")


def side_file(source: str) -> Path:
    """The file that a side names, without its @cpu or @cuda."""
    return Path(_split(source)[0])


def _split(source: str) -> tuple[str, str]:
    name, at, form = source.rpartition("@")
    return (name, form) if at and form in ("collapsed", "openvino", *PROVIDERS) else (source, "")


def _refuse(source: str, form: str) -> None:
    if form:
        raise ReparamError(
            f"{source}: @{form} has no meaning here; @collapsed goes with a model, @cpu, @cuda and "
            "@openvino with an ONNX file"
        )


def inputs_of_files(sources: Sequence[str], batch: int) -> tuple[Tensor, ...] | None:
    """Random inputs of the shapes that the first ONNX file of these takes; None without one.

    Floating inputs are float32: a comparison casts them. Raises ReparamError where the file leaves
    a shape open, and NotVerified where it cannot be run here.
    """
    for source in sources:
        name, _ = _split(source)
        if name.endswith(".onnx"):
            runner = load_side(name, None, inputs=(), allow_pickle=False)
            assert isinstance(runner, OnnxRunner)
            try:
                tensors = example_inputs(runner.inputs, batch)
            except ExportError as error:
                raise ReparamError(f"{source}: {error.reason}; or give --input-shape") from error
            return tuple(t.float() if t.is_floating_point() else t for t in tensors)
    return None
