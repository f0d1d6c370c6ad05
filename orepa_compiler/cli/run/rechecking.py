"""Checks a manifest again: the same files, gates and numbers, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from orepa_compiler.cli.run.steps import NOT_RUN_ON_A_GPU, ExportStep, Verdict, attempt, judged
from orepa_compiler.errors import ExportError, MissingPackage, NotRun, ReparamError
from orepa_compiler.export.gates.artifact import check_collapsed, check_precision
from orepa_compiler.export.gates.counting import Counts, node_count
from orepa_compiler.export.gates.network import inspect_network
from orepa_compiler.export.manifest import FileRecord, read_manifest
from orepa_compiler.export.onnx.inspection import conv_nodes
from orepa_compiler.export.onnx.precision import ELEMENT_TYPES
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.export.onnx.weight_record import check_weights
from orepa_compiler.export.run.openvino import OpenVINORunner
from orepa_compiler.export.run.runners import OnnxRunner, TensorRTRunner
from orepa_compiler.export.run.session import PRESET_KEY
from orepa_compiler.proving.certificate import CERTIFICATE_KEY, Certificate
from orepa_compiler.verification.sample_file import load_samples

CUDA = "CUDAExecutionProvider"


def recheck_steps(path: Path) -> list[ExportStep]:
    """Every check of a manifest, made again; one that cannot be made here is "not run".

    The checkpoint, the GPU and TensorRT may be missing: the files are then judged without them.
    Raises ReparamError where the manifest itself cannot be read.
    """
    again = _Recheck(path)
    steps = []
    for name, is_required, run in again.stages():
        steps.append(attempt(name, True, run, is_required=is_required))
    return steps


class _Recheck:
    def __init__(self, path: Path) -> None:
        self.folder, self.manifest = path.parent, read_manifest(path)

    def stages(self) -> Iterator[tuple[str, bool, Callable[[], ExportStep]]]:
        """Name, whether it has to be made for a pass, and what to do."""
        for record in self.manifest.files:
            is_needed = record.role != "checkpoint"
            yield f"{record.role} file", is_needed, partial(self.file, record)
        yield "onnx gates", True, self.gates
        yield "certificate", False, self.certificate
        yield "network gates", False, self.network
        yield "onnx on the CPU", True, partial(self.onnx, "CPUExecutionProvider")
        yield "onnx on the GPU", False, partial(self.onnx, CUDA)
        if self.manifest.of("openvino"):
            yield "openvino", False, self.openvino
        if self.manifest.of("engine"):
            yield "engine", False, self.engine

    def path_of(self, role: str) -> Path:
        records = [record for record in self.manifest.files if record.role == role]
        if not records:
            raise NotRun(f"the manifest names no {role} file; export again to have one")
        return self.folder / records[0].name

    def file(self, record: FileRecord) -> ExportStep:
        name, path = f"{record.role} file", self.folder / record.name
        if record.role == "checkpoint" and not path.is_file():
            raise NotRun(f"{path} is not here, and the artifact does not need it")
        if problem := record.problem(self.folder):
            return ExportStep(name, "mismatch", cause=ReparamError(problem))
        return ExportStep(name, "pass", path)

    def gates(self) -> ExportStep:
        path = self.path_of("onnx")
        model = load_graph(path)
        convs = conv_nodes(model)
        try:
            weights = check_weights(path, model)
            kept = model.metadata_props.get("orepa.keep_fp32", "").split()
            check_precision(convs, ELEMENT_TYPES[self.manifest.options["precision"]], kept=kept)
            check_collapsed(model, convs)
        except ExportError as error:
            return ExportStep("onnx gates", "mismatch", cause=error)
        held = f"{Counts.of_graph(model)}, {node_count(model)} nodes"
        return ExportStep("onnx gates", "pass", note=f"{held}; {weights} weights unchanged")

    def certificate(self) -> ExportStep:
        model = load_graph(self.path_of("onnx"))
        text = model.metadata_props.get(CERTIFICATE_KEY)
        if text is None:
            raise NotRun("the file holds no certificate")
        certificate = Certificate.from_json(text)
        reason = None if certificate else ReparamError(certificate.verdict)
        note = "" if reason else certificate.verdict
        verdict: Verdict = "mismatch" if reason else "pass"
        return ExportStep("certificate", verdict, note=note, cause=reason, certificate=certificate)

    def network(self) -> ExportStep:
        path = self.path_of("onnx")
        if load_graph(path).metadata_props.get(PRESET_KEY) == "cpu":
            raise NotRun("it is an int8 file for CPUs, which TensorRT cannot parse")
        try:
            summary = inspect_network(path)
        except MissingPackage:
            raise
        except ExportError as error:
            return ExportStep("network gates", "mismatch", cause=error)
        return ExportStep("network gates", "pass", note=str(summary))

    def onnx(self, provider: str) -> ExportStep:
        name = "onnx on the GPU" if provider == CUDA else "onnx on the CPU"
        runner = OnnxRunner(self.path_of("onnx"), provider=provider)
        return judged(name, load_samples(self.path_of("samples")), runner)

    def openvino(self) -> ExportStep:
        samples = load_samples(self.path_of("samples"))
        return judged("openvino", samples, OpenVINORunner(self.path_of("openvino")))

    def engine(self) -> ExportStep:
        if not torch.cuda.is_available():
            raise NotRun(f"{NOT_RUN_ON_A_GPU} (there is no GPU here)")
        samples = load_samples(self.path_of("samples"))
        return judged("engine", samples, TensorRTRunner(self.path_of("engine")))
