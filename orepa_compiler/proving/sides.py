"""Any two sides compared: torch models, functions, and the files that were made of them."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from orepa_compiler.choices import ENGINES as ENGINES
from orepa_compiler.choices import OPENVINO
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.int8.verdict import verify_int8
from orepa_compiler.export.run.openvino import OpenVINORunner
from orepa_compiler.export.run.runners import OnnxRunner, TensorRTRunner
from orepa_compiler.int8.comparing import verify_rounded
from orepa_compiler.quantization.layers import rounded_layers
from orepa_compiler.verification import NOISE_FACTOR, Report
from orepa_compiler.verification import verify_callables as verify_functions

Side = Callable[..., Any] | str | PathLike[str]


def runner_of(side: Side) -> Callable[..., Any]:
    """Gives what a comparison calls: the side itself, or a runner of the file that it names.

    An ONNX file runs in onnxruntime on the CPU (OnnxRunner takes another provider) or, as
    FILE.onnx@openvino, in OpenVINO, as an .xml does; an engine on the GPU. Raises ReparamError for
    any other file, and what the runners raise.
    """
    if not isinstance(side, (str, PathLike)):
        return side
    path = Path(side)
    if path.name.endswith(".onnx@openvino"):
        return OpenVINORunner(path.with_name(path.name.removesuffix("@openvino")))
    if path.suffix in ENGINES:
        return TensorRTRunner(path)
    if path.suffix == ".onnx":
        return OnnxRunner(path)
    if path.suffix == OPENVINO:
        return OpenVINORunner(path)
    raise ReparamError(
        f"{path}: a file that is compared is an .onnx, an .xml or an engine "
        f"({', '.join(ENGINES)}); of weights, load the model and give that"
    )


def verify(
    reference: Side,
    candidate: Side,
    inputs: Any,
    *,
    truth: nn.Module | None = None,
    precision: str | None = None,
    factor: float = NOISE_FACTOR,
    stress: bool = False,
) -> Report:
    """Judges `candidate`: truthy only when every output of every batch agrees.

        report = orepa.verify(model, "resnet18.onnx", images)
        assert report, report

    max |candidate - truth| / max |truth|  <=  factor * max(noise, eps)

    The truth is the reference evaluated in float64. The noise is the reference's own error beside
    it, and that of the same forward with each weight rounded anew: a right candidate has weights of
    another rounding. Masks and indices are compared exactly where the reference decides them
    clearly. Modules are evaluated in eval mode without gradients, and are left as they were. An
    output that mixes quantities of different size is judged by the largest. Of a reference that
    rounds to int8 (fake_quantize) an ONNX file must have every integer, step and range, and the
    noise is that of values which fall on another step.

    reference, candidate: modules, functions on tensors, or paths of ONNX files and engines. inputs:
    a tensor, a tuple of positional arguments, or a list of such batches; arguments may be nested.
    truth: the module to evaluate in float64, where it is not the reference. precision: fp32, fp16
    or bf16, where the candidate computes in another type than the reference; its floating inputs
    then come in that type, and the noise is that of the truth's module in that type; int8 where it
    is an int8 ONNX file, whose noise is made with its ranges (give inputs of the kind that these
    were taken on), and which has to decide as often alike as that noise does. factor: how
    many times the noise a candidate's error may be. stress: compare also on inputs made from the
    first batch (random, constant, ten times and a hundredth of it); where the reference itself
    gives nothing finite there, a note says so, and no row.

    Raises NoVerdict where a side, called again on the first batch, gives other outputs, and names
    the first module that does. Raises ReparamError when there are no values to compare (a module or
    input on the meta device), when a side raises, when inputs are of the wrong kind or on another
    device than a module, when the reference does not run in float64, and for a file that cannot be
    run.
    """
    if isinstance(reference, nn.Module) and rounded_layers(reference):
        if truth is not None or precision not in (None, "int8"):
            raise ReparamError(
                "the reference rounds to int8: it is its own truth, in its own precision; leave "
                "out truth= and precision="
            )
        other = runner_of(candidate)
        return verify_rounded(reference, other, inputs, factor=factor, stress=stress)
    if precision == "int8":
        if stress:
            raise ReparamError(
                "an int8 file covers only the ranges of its calibration data, and the inputs of "
                "stress=True are beyond them; give stress=False"
            )
        sides = runner_of(reference), runner_of(candidate)
        return verify_int8(*sides, inputs, truth=truth, factor=factor)
    options: dict[str, Any] = {"truth": truth, "precision": precision, "factor": factor}
    return verify_functions(
        runner_of(reference), runner_of(candidate), inputs, stress=stress, **options
    )
