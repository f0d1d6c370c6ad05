"""For your own tests: an assertion that two models compute the same, which says where they do not.

from orepa_compiler.testing import assert_equivalent

def test_the_deployed_model(model, images):
    assert_equivalent(model, orepa.collapse(model), images)
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import nn

from orepa_compiler.proving.locating import explain_report
from orepa_compiler.proving.sides import runner_of, verify
from orepa_compiler.verification import NOISE_FACTOR, Report
from orepa_compiler.verification.divergence import Divergence, plain_map


def assert_equivalent(
    model: Callable[..., Any] | str | PathLike[str],
    deploy: Callable[..., Any] | str | PathLike[str],
    inputs: Any,
    *,
    truth: nn.Module | None = None,
    precision: str | None = None,
    factor: float = NOISE_FACTOR,
    stress: bool = True,
) -> Report:
    """The report, where `deploy` computes what `model` does; arguments as in orepa.verify.

    model, deploy: modules, functions, or paths of ONNX files (run on the CPU) and TensorRT engines.

    Raises AssertionError with the report, the first module that differs and a picture of its error
    where they differ; ReparamError where they cannot be compared: that is no pass either.
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    left, right = runner_of(model), runner_of(deploy)
    options: dict[str, Any] = {"truth": truth, "precision": precision, "factor": factor}
    is_int8 = precision == "int8"  # its ranges are those of the inputs, and its notes say where
    report = verify(left, right, inputs, stress=stress and not is_int8, **options)
    if not report and is_int8:
        raise AssertionError(str(report))
    if not report:
        raise AssertionError(f"{report}\n{_where(left, right, inputs, report, precision)}")
    return report


def _where(left: Any, right: Any, inputs: Any, report: Report, precision: str | None) -> str:
    found = explain_report(left, right, inputs, report, precision=precision)
    if isinstance(found, Divergence) and found.error_map:
        return f"{found}\n{plain_map(found.error_map)}"
    return str(found)
