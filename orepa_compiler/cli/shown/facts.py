"""Says of an export, in a line each: the command, the file's interface, its latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orepa_compiler.cli.given.export_request import ExportRequest
from orepa_compiler.cli.run.steps import ExportStep
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.gates.counting import Counts, node_count
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.export.run.session import PRESET_KEY
from orepa_compiler.export.run.signature import Interface
from orepa_compiler.verification import Report

Fact = tuple[str, tuple[str, ...]]
Facts = tuple[Fact, ...]


def export_facts(request: ExportRequest, steps: Sequence[ExportStep]) -> Facts:
    """Of orepa-export."""
    by_name = {step.name: step for step in steps}
    written = by_name.get("write onnx")
    kept = f", but {', '.join(request.keep_fp32)} in fp32" if request.keep_fp32 else ""
    facts: list[Fact] = [
        ("command", (request.command,)),
        ("precision", (f"{request.precision}{kept}",)),
    ]
    if written is not None and written.file is not None:
        facts += file_facts(written.file)
    timings = [f"{step.name.removeprefix('check ')}: {step.latency}" for step in steps
               if step.latency]  # fmt: skip
    facts += [("latency", tuple(timings) or (_NOT_MEASURED,))]
    return _filled((*facts, *_agreement(request.precision, steps)))


_NOT_MEASURED = "not measured: no file was run"


def recheck_facts(command: str, precision: str, onnx: Path, steps: Sequence[ExportStep]) -> Facts:
    """Of a manifest that is checked again."""
    facts = [("command", (command,)), ("precision", (precision,)), *file_facts(onnx)]
    return _filled((*facts, *_agreement(precision, steps)))


def comparison_facts(command: str, precision: str | None, report: Report) -> Facts:
    """Of two sides that were compared."""
    said = tuple(map(str, report.agreements))
    facts = (("command", (command,)), ("precision", (precision or report.precision,)))
    return _filled((*facts, ("int8 agreement", said)))


def file_facts(path: Path) -> list[Fact]:
    """Of an ONNX file; nothing of one that cannot be read, which a step says."""
    try:
        model = load_graph(path)
    except ReparamError:
        return []
    held = Interface.of(model)
    return [
        ("int8 preset", (model.metadata_props.get(PRESET_KEY, ""),)),
        ("opset", (str(held.opset),)),
        ("inputs", held.inputs),
        ("outputs", held.outputs),
        ("graph", (f"{Counts.of_graph(model)}, {node_count(model)} nodes",)),
    ]


def _agreement(precision: str, steps: Sequence[ExportStep]) -> Facts:
    if precision != "int8":
        return ()
    said = [f"{s.name}: {a}" for s in steps if s.report for a in s.report.agreements]
    return (("int8 agreement", tuple(said) or ("no output has a top-1, or nothing was run",)),)


def _filled(facts: Facts) -> Facts:
    return tuple((name, texts) for name, texts in facts if any(texts))
