"""Answers otherwise what a forward asks the process: whether it is traced, compiled, exported.

A model that leaves its norm out while it is exported is folded as it runs today, and exported
wrongly. Gradients, inference mode and autocast are asked for in nearly every model, and flipped
in every second trace (see noticing); these few forwards ask for, and only they are traced again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from unittest import mock

import torch

from orepa_compiler.capture.tracing.bytecode import cell_contents, names_in

# torch.jit.is_scripting is not among them: no forward that Python runs is told that it is.
_QUESTIONS = {
    "is_tracing", "is_compiling", "is_dynamo_compiling", "is_exporting", "is_in_onnx_export",
    "are_deterministic_algorithms_enabled", "is_deterministic_algorithms_warn_only_enabled",
    "get_deterministic_debug_mode", "is_anomaly_enabled",
}  # fmt: skip


def questions_to_process(functions: Iterable[FunctionType]) -> frozenset[str]:
    """Names what functions ask the process, by torch's names or by names of their own."""
    named = frozenset(name for function in functions for name in _named(function))
    return named & _QUESTIONS


def _named(function: FunctionType) -> Iterator[str]:
    names = names_in(function.__code__)
    yield from names
    around = [function.__globals__[name] for name in names if name in function.__globals__]
    around += [cell_contents(cell) for cell in function.__closure__ or ()]
    for value in around:
        if isinstance(value, (FunctionType, BuiltinFunctionType)):  # imported as another name
            yield value.__name__


@contextmanager
def process_answering_otherwise() -> Iterator[None]:
    """Has torch say what it does not say now: that it traces, compiles, exports, is deterministic.

    The state is set that torch looks at, so that a function imported by its own name says so too.
    """
    debug_mode = torch.get_deterministic_debug_mode()
    finds_anomalies = torch.is_anomaly_enabled()
    tracing = not torch._C._is_tracing()
    compiling, exporting = not torch.compiler.is_compiling(), not torch.compiler.is_exporting()
    try:
        torch.set_deterministic_debug_mode(0 if debug_mode else 1)
        torch.autograd.set_detect_anomaly(not finds_anomalies, check_nan=False)
        with (
            mock.patch.object(torch._C, "_is_tracing", return_value=tracing),
            mock.patch.object(torch.compiler, "_is_compiling_flag", compiling),
            mock.patch.object(torch.compiler, "_is_exporting_flag", exporting),
            mock.patch.object(torch.onnx, "is_in_onnx_export", return_value=True),
        ):
            yield
    finally:
        torch.autograd.set_detect_anomaly(finds_anomalies)
        torch.set_deterministic_debug_mode(debug_mode)
