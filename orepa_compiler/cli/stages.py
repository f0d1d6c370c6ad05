"""From a model's name and a checkpoint to ONNX and TensorRT, each step checked against the last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from orepa_compiler.cli.arguments import load_source, random_inputs
from orepa_compiler.compiler import collapse
from orepa_compiler.export.flavors import Flavor
from orepa_compiler.export.onnx import Precision, export_onnx
from orepa_compiler.export.progress import announced
from orepa_compiler.export.runners import OnnxRunner, TensorRTRunner
from orepa_compiler.export.tensorrt import build_engine
from orepa_compiler.verification import Report, verify

Verdict = Literal["pass", "mismatch", "failed", "not run", "done"]

# Said of an engine that no GPU has run; it is not a pass.
NOT_RUN_ON_A_GPU = "device numerics: not run"


@dataclass(frozen=True)
class ExportRequest:
    """What orepa-export was asked for.

    shapes: of the inputs, without the batch. batch: of the inputs compared; None is 1 where the
    artifacts keep it, and 2 where it is free, so that more than one image is really compared.
    """

    model: str
    onnx: Path
    checkpoint: Path | None = None
    engine: Path | None = None
    shapes: tuple[tuple[int, ...], ...] = ((3, 224, 224),)
    batch: int | None = None
    precision: Precision = "fp32"
    static_batch: bool = False
    simplify: bool = False
    flavor: Flavor = "auto"
    compute_capability: str | None = None
    allow_pickle: bool = False

    def inputs(self) -> tuple[Tensor, ...]:
        return random_inputs(self.shapes, self.batch or (1 if self.static_batch else 2))


@dataclass(frozen=True)
class Step:
    """One step of an export and what came of it.

    error: the largest error of a comparison. report: the comparison itself. cause: what kept the
    step from being done. is_required: whether the export has failed to verify without it.
    """

    name: str
    verdict: Verdict
    file: Path | None = None
    error: float | None = None
    note: str = ""
    report: Report | None = None
    cause: Exception | None = None
    is_required: bool = True


def export_steps(request: ExportRequest) -> list[Step]:
    """The steps of an export, up to the first that fails or differs.

    Raises ReparamError for a mistake in what was asked for; what goes wrong later is a step.
    """
    export = _Export(request)
    steps: list[Step] = []
    for name, is_check, run in export.stages():
        steps.append(_attempt(name, is_check, run))
        if steps[-1].verdict in ("failed", "mismatch"):
            break
    return steps


class _Export:
    """The model on its way through the stages: as trained, then collapsed."""

    def __init__(self, request: ExportRequest) -> None:
        self.request = request
        self.inputs = request.inputs()
        self.model = load_source(
            request.model,
            request.checkpoint,
            allow_pickle=request.allow_pickle,
            inputs=self.inputs,
        )

    def stages(self) -> list[tuple[str, bool, Callable[[], Step]]]:
        """Name, whether it only checks, and what to do, in order."""
        stages: list[tuple[str, bool, Callable[[], Step]]] = [
            ("load", False, self.loaded),
            ("collapse", False, self.collapse),
            ("check collapse", True, self.check_collapse),
            ("write onnx", False, self.write_onnx),
            ("check onnx", True, self.check_onnx),
        ]
        if self.request.engine is not None:
            stages += [
                ("build engine", False, self.build_engine),
                ("check engine", True, self.check_engine),
            ]
        return stages

    def loaded(self) -> Step:
        checkpoint = self.request.checkpoint
        note = "" if checkpoint else "no --checkpoint: the weights that the model came with"
        return Step("load", "done", checkpoint, note=note)

    def collapse(self) -> Step:
        with announced("collapsing"):
            self.deploy = collapse(self.model, inputs=self.inputs)
        return Step("collapse", "done")

    def check_collapse(self) -> Step:
        with announced("comparing the collapsed model"):
            return _compared("check collapse", verify(self.model, self.deploy, self.inputs))

    def write_onnx(self) -> Step:
        request = self.request
        path = export_onnx(
            self.deploy,
            self.inputs,
            request.onnx,
            dynamic_batch=not request.static_batch,
            precision=request.precision,
            simplify=request.simplify,
        )
        return Step("write onnx", "done", path)

    def check_onnx(self) -> Step:
        with announced("running the ONNX file"):
            return self._check("check onnx", OnnxRunner(self.request.onnx))

    def build_engine(self) -> Step:
        request = self.request
        assert request.engine is not None
        path = build_engine(
            request.onnx,
            request.engine,
            flavor=request.flavor,
            compute_capability=request.compute_capability,
        )
        return Step("build engine", "done", path)

    def check_engine(self) -> Step:
        assert self.request.engine is not None
        if not torch.cuda.is_available():
            note = f"{NOT_RUN_ON_A_GPU} (there is no GPU here)"
            return Step("check engine", "not run", note=note, is_required=False)
        with announced("running the engine"):
            return self._check("check engine", TensorRTRunner(self.request.engine))

    def _check(self, name: str, runner: Callable[..., Any]) -> Step:
        precision = self.request.precision
        return _compared(name, verify(self.deploy, runner, self.inputs, precision=precision))


def _attempt(name: str, is_check: bool, run: Callable[[], Step]) -> Step:
    try:
        return run()
    except Exception as error:  # whatever stops a step is told in one line, and is no pass
        # A check that cannot be made says nothing against the artifact: the next step may go on.
        return Step(name, "not run" if is_check else "failed", cause=error)


def _compared(name: str, report: Report) -> Step:
    return Step(name, "pass" if report else "mismatch", error=report.max_error, report=report)
