"""Goes from a model and a checkpoint to ONNX and TensorRT; each step is checked by the last."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from orepa_compiler.blocks import ConvBlock
from orepa_compiler.cli.given.export_request import ExportRequest
from orepa_compiler.cli.given.models import (
    check_it_runs,
    check_tensors,
    load_told,
    warn_of_random_weights,
)
from orepa_compiler.cli.run.evaluating import Evaluation
from orepa_compiler.cli.run.manifesting import manifest_step
from orepa_compiler.cli.run.sampling import INT8_BATCHES, preset_advice, samples_for
from orepa_compiler.cli.run.steps import (
    NOT_RUN_ON_A_GPU,
    ExportStep,
    Verdict,
    attempt,
    compared,
    judged,
)
from orepa_compiler.compiler import collapse
from orepa_compiler.errors import Int8RangeWarning, Interrupted, NormsLeftWarning, ReparamError
from orepa_compiler.export.audit import HALVES, audit_half
from orepa_compiler.export.latency import timed
from orepa_compiler.export.onnx.precision import PRECISIONS, cast_tensors, kept_modules
from orepa_compiler.export.onnx.writing import export_onnx
from orepa_compiler.export.run.openvino import OpenVINORunner, write_openvino
from orepa_compiler.export.run.runners import OnnxRunner, TensorRTRunner
from orepa_compiler.export.tensorrt.engine import build_engine
from orepa_compiler.int8.analysis import int8_loss
from orepa_compiler.progress import announced
from orepa_compiler.proving.certificate import Certificate
from orepa_compiler.proving.certifying import certify
from orepa_compiler.proving.locating import explain_report
from orepa_compiler.proving.sides import verify
from orepa_compiler.quantization.layers import rounded_layers
from orepa_compiler.report import block_branches, measure_model
from orepa_compiler.verification import Samples
from orepa_compiler.verification.nesting import tensors_in


def export_steps(request: ExportRequest) -> list[ExportStep]:
    """The steps of an export, up to the first that fails or differs.

    Raises ReparamError for a mistake in what was asked for; what goes wrong later is a step.
    """
    export = _Export(request)
    steps: list[ExportStep] = []
    for name, is_check, run in export.stages():
        try:
            steps.append(attempt(name, is_check, run))
        except KeyboardInterrupt as error:
            raise Interrupted(_left(name, steps)) from error
        if steps[-1].verdict in ("failed", "mismatch"):
            break
    if export.has_written:
        steps.append(attempt("write manifest", False, lambda: export.write_manifest(steps)))
    return steps


def _left(name: str, steps: list[ExportStep]) -> str:
    """What Ctrl-C leaves behind: whole files, for each is put in its place when it is finished."""
    files = [str(step.file) for step in steps if step.file and step.name != "load"]
    written = f"{' and '.join(files)} is written and whole" if files else "nothing was written"
    return f"stopped by Ctrl-C in the step {name!r}; {written}, and there is no manifest"


class _Export:
    """The model on its way through the stages: as trained, then collapsed."""

    def __init__(self, request: ExportRequest) -> None:
        self.request = request
        self.model, self.origin = load_told(
            request.model,
            request.checkpoint,
            allow_pickle=request.allow_pickle,
            pretrained=request.pretrained,
            num_classes=request.num_classes,
            weights=request.weights,
            expanded=request.expanded,
        )
        warn_of_random_weights(request.model, self.origin)
        self.inputs = request.inputs(self.model)
        given = check_it_runs(request.model, self.model, self.inputs[0])
        check_tensors(request.model, given)
        request.check_interface(self.model, self.inputs[0], given)
        self.is_trained = bool(rounded_layers(self.model))  # to round to int8
        self.calibration = request.calibrating(
            self.model, self.inputs[0], is_trained=self.is_trained
        )
        kept_modules(self.model, request.keep_fp32)  # a pattern that matches nothing stops here
        self.evaluation = Evaluation(request.evaluate) if request.evaluate else None
        self.certificate: Certificate | None = None
        self._samples: Samples | None = None
        self.has_written = False

    def stages(self) -> list[tuple[str, bool, Callable[[], ExportStep]]]:
        """Name, whether it only checks, and what to do, in order."""
        request = self.request
        stages: list[tuple[str, bool, Callable[[], ExportStep]]] = [
            ("load", False, self.loaded),
            ("collapse", False, self.collapse),
            ("check collapse", True, self.check_collapse),
            ("certify collapse", True, self.certify),
            *([("audit half", True, self.audit)] if request.precision in HALVES else []),
            *([("measure int8", False, self.measure_int8)] if self.is_calibrated else []),
            ("write onnx", False, self.write_onnx),
            ("check onnx", True, self.check_onnx),
        ]
        if request.openvino is not None:
            stages += [
                ("write openvino", False, self.write_openvino),
                ("check openvino", True, self.check_openvino),
            ]
        stages += self.evaluations()
        if self.request.engine is not None:
            stages += [
                ("build engine", False, self.build_engine),
                ("check engine", True, self.check_engine),
                *([("evaluate engine", True, self.evaluate_engine)] if request.evaluate else []),
            ]
        return stages

    def loaded(self) -> ExportStep:
        return ExportStep("load", "done", self.request.checkpoint, note=self.origin)

    def collapse(self) -> ExportStep:
        with announced("collapsing"), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", NormsLeftWarning)
            self.deploy = collapse(self.model, inputs=self.inputs)
        left = [str(w.message) for w in told if issubclass(w.category, NormsLeftWarning)]
        step = ExportStep("collapse", "done", note="; ".join(left))
        if self.request.report is None:
            return step
        sizes = (
            measure_model("model as loaded", self.model, self.inputs),
            measure_model("collapsed model", self.deploy, self.inputs),
        )
        return replace(step, sizes=sizes, branches=block_branches(self.model))

    def check_collapse(self) -> ExportStep:
        with announced("comparing the collapsed model"):
            report = verify(self.model, self.deploy, self.inputs, stress=True)
        step = compared("check collapse", report)
        if report:
            return step
        found = explain_report(self.model, self.deploy, self.inputs, report)
        return replace(step, divergence=found)

    def certify(self) -> ExportStep:
        if self.is_trained:
            note = "it rounds to int8: its integers are compared with the file's, one by one"
            return ExportStep("certify collapse", "done", note=note)
        with announced("certifying the collapse"):
            certificate = certify(self.model, self.deploy, self.inputs)
        if not certificate.blocks:
            note = "there was nothing to collapse"
            return ExportStep("certify collapse", "done", note=note)
        self.certificate = certificate
        verdict: Verdict = "pass" if certificate else "mismatch"
        cause = None if certificate else ReparamError(certificate.verdict)
        error = max(block.error or 0.0 for block in certificate.blocks)
        return ExportStep(
            "certify collapse", verdict, None, error, cause=cause, certificate=certificate
        )

    def audit(self) -> ExportStep:
        request = self.request
        with announced(f"looking at what {request.precision} does to the values"):
            found = audit_half(
                self.deploy,
                self.calibration or self.inputs,
                precision=request.precision,
                keep_fp32=request.keep_fp32,
            )
        # What half precision breaks is seen when the file is checked; this says where and why.
        return ExportStep("audit half", "done", note=found.verdict, audit=found)

    @property
    def is_calibrated(self) -> bool:
        """Whether it is written in int8 with ranges that no training made."""
        return self.request.precision == "int8" and not self.is_trained

    def measure_int8(self) -> ExportStep:
        with announced("measuring each module in int8"):
            found = int8_loss(self.deploy, self.calibration[:INT8_BATCHES])
        return ExportStep("measure int8", "done", note=found.verdict)

    def write_onnx(self) -> ExportStep:
        request = self.request
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", Int8RangeWarning)
            path = export_onnx(
                self.deploy,
                self.inputs,
                request.onnx,
                dynamic_batch=not request.static_batch,
                dynamic_size=request.dynamic_size,
                input_names=request.input_names or None,
                output_names=request.output_names or None,
                precision=request.precision,
                simplify=request.simplify,
                opset=request.opset,
                certificate=self.certificate,
                keep_fp32=request.keep_fp32,
                calibration=self.calibration,
                int8_preset=request.int8_preset,
            )
        self.has_written = True
        ranges = [str(w.message) for w in told if issubclass(w.category, Int8RangeWarning)]
        return ExportStep("write onnx", "done", path, note="; ".join(ranges))

    def check_onnx(self) -> ExportStep:
        with announced("running the ONNX file"):
            runner = OnnxRunner(self.request.onnx)
            step = self._timed(judged("check onnx", self.samples(), runner), runner)
        # Every module of an int8 file is off by more than the noise of float32.
        if step.report or self.request.precision == "int8":
            return step
        assert step.report is not None
        precision = self.request.precision
        found = explain_report(self.deploy, runner, self.inputs, step.report, precision=precision)
        return replace(step, divergence=found)

    def samples(self) -> Samples:
        """What the collapsed model gives: taken once, for every artifact and for the manifest."""
        if self._samples is None:
            given = self.calibration if self.is_calibrated else self.inputs
            self._samples = samples_for(
                self.request, self.deploy, given, is_trained=self.is_trained
            )
        return self._samples

    def write_openvino(self) -> ExportStep:
        assert self.request.openvino is not None
        with announced("writing OpenVINO's file"):
            path = write_openvino(self.request.onnx, self.request.openvino)
        return ExportStep("write openvino", "done", path)

    def check_openvino(self) -> ExportStep:
        assert self.request.openvino is not None
        with announced("running OpenVINO"):
            runner = OpenVINORunner(self.request.openvino)
            step = judged("check openvino", self.samples(), runner)
        return step if step.report else replace(step, note=preset_advice(self.request.onnx))

    def evaluations(self) -> list[tuple[str, bool, Callable[[], ExportStep]]]:
        """Where a function tells how good a form is: the model, the collapsed one, the file."""
        if self.evaluation is None:
            return []
        expanded = any(isinstance(module, ConvBlock) for module in self.model.modules())
        forms: list[tuple[str, Callable[[], Callable[..., Any]]]] = [
            ("expanded model" if expanded else "model", lambda: self.model),
            *([("stock model", self.stock)] if expanded else []),
            ("collapsed model", lambda: self.deploy),
            ("ONNX file", lambda: OnnxRunner(self.request.onnx)),
        ]
        if (file := self.request.openvino) is not None:
            forms.append(("OpenVINO file", lambda: OpenVINORunner(file)))
        return [
            (f"evaluate {form}", True, partial(self.evaluate, form, side)) for form, side in forms
        ]

    def evaluate(self, form: str, side: Callable[[], Callable[..., Any]]) -> ExportStep:
        assert self.evaluation is not None
        found = self.evaluation.of(form, side())
        return ExportStep(f"evaluate {form}", "done", note=str(found), scores=found.scores)

    def stock(self) -> Callable[..., Any]:
        """The expanded model as the architecture that it began as, its norms kept."""
        return collapse(self.model, inputs=self.inputs, fold_norm=False)

    def evaluate_engine(self) -> ExportStep:
        engine = self.request.engine
        assert engine is not None
        return _without_gpu("evaluate engine") or self.evaluate(
            "engine", lambda: TensorRTRunner(engine)
        )

    def build_engine(self) -> ExportStep:
        request = self.request
        assert request.engine is not None
        path = build_engine(
            request.onnx,
            request.engine,
            flavor=request.flavor,
            compute_capability=request.compute_capability,
            shapes=request.profile,
            workspace_gb=request.workspace_gb,
            tf32=request.tf32,
            timing_cache=request.timing_cache,
        )
        return ExportStep("build engine", "done", path)

    def check_engine(self) -> ExportStep:
        assert self.request.engine is not None
        if (step := _without_gpu("check engine")) is not None:
            return step
        with announced("running the engine"):
            runner = TensorRTRunner(self.request.engine)
            return self._timed(judged("check engine", self.samples(), runner), runner)

    def _timed(self, step: ExportStep, runner: Callable[..., Any]) -> ExportStep:
        """With the latency of what was run, where a page is to show it."""
        if self.request.report is None:
            return step
        batch = self.samples().batches[0]
        dtype = PRECISIONS[self.request.precision]
        tensors = [cast_tensors(leaf, dtype) for leaf in tensors_in(batch)]
        return replace(step, latency=timed(runner, tensors, len(tensors[0])))

    def write_manifest(self, steps: list[ExportStep]) -> ExportStep:
        return manifest_step(self.request, steps, self.samples)


def _without_gpu(name: str) -> ExportStep | None:
    """The step of an engine where there is no GPU to run it on; None where there is one."""
    if torch.cuda.is_available():
        return None
    note = f"{NOT_RUN_ON_A_GPU} (there is no GPU here)"
    return ExportStep(name, "not run", note=note, is_required=False)
