"""Builds the page of a command from what its steps, or its comparison, came to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from orepa_compiler.cli.given.export_request import ExportRequest
from orepa_compiler.cli.given.options import ExitCode, NotVerified
from orepa_compiler.cli.run.named_sides import side_file
from orepa_compiler.cli.run.steps import ExportStep, finite
from orepa_compiler.cli.shown.facts import comparison_facts, export_facts, recheck_facts
from orepa_compiler.cli.shown.summary import complaints, verdict
from orepa_compiler.export.manifest import Check, read_manifest
from orepa_compiler.proving.certificate import LIMIT
from orepa_compiler.report import (
    Link,
    ModelSize,
    Outcome,
    Page,
    block_branches,
    measure_model,
    write_page,
)
from orepa_compiler.verification import Report
from orepa_compiler.verification.divergence import Divergence

_OUTCOMES: dict[ExitCode, Outcome] = {
    ExitCode.PASS: "pass",
    ExitCode.MISMATCH: "mismatch",
    ExitCode.EXPORT_FAILED: "failed",
    ExitCode.NOT_VERIFIED: "not run",
}
_NO_BLOCKS = "the model has no block, so it has no branches; load the expanded model to see them"
_NOT_LOADED = "a manifest is checked without the model"


def page_of_export(request: ExportRequest, steps: Sequence[ExportStep]) -> Page:
    """The page of orepa-export."""
    by_name = {step.name: step for step in steps}
    collapsed = by_name.get("collapse", ExportStep("collapse", "not run"))
    first = "expanded model" if collapsed.branches else "model as loaded"
    links = [
        _link(by_name, "collapsed model", first, "check collapse"),
        _link(by_name, "ONNX file", "collapsed model", "check onnx"),
    ]
    if request.openvino is not None:
        links.append(_link(by_name, "OpenVINO file", "collapsed model", "check openvino"))
    if request.engine is not None:
        links.append(_link(by_name, "TensorRT engine", "collapsed model", "check engine"))
    file = by_name["write manifest"].file if "write manifest" in by_name else None
    return Page(
        title=f"orepa-export {request.model}",
        first=first,
        links=tuple(links),
        sizes=(*collapsed.sizes, *_file_sizes(steps)),
        branches=collapsed.branches,
        facts=export_facts(request, steps),
        manifest=read_manifest(file) if file else None,
        absent=(("branches", _NO_BLOCKS), *_why_no_certificate(by_name.get("certify collapse"))),
        **_found(steps),
    )


def page_of_recheck(path: Path, steps: Sequence[ExportStep], command: str = "") -> Page:
    """The page of a manifest that was checked again."""
    by_name = {step.name: step for step in steps}
    links = [
        _collapse_link(by_name["certificate"]),
        _link(by_name, "ONNX file on the CPU", "collapsed model", "onnx on the CPU"),
        _link(by_name, "ONNX file on the GPU", "collapsed model", "onnx on the GPU"),
    ]
    if "engine" in by_name:
        links.append(_link(by_name, "TensorRT engine", "collapsed model", "engine"))
    manifest = read_manifest(path)
    onnx = path.parent / next((record.name for record in manifest.of("onnx")), "")
    return Page(
        title=f"orepa verify {path}",
        first="model as loaded",
        links=tuple(links),
        facts=recheck_facts(command, str(manifest.options.get("precision", "")), onnx, steps),
        sizes=_recorded_sizes(path, steps),
        manifest=manifest,
        absent=(
            ("sizes", _NOT_LOADED),
            ("branches", _NOT_LOADED),
            ("audit", _NOT_LOADED),
            *_why_no_certificate(by_name["certificate"]),
        ),
        **_found(steps),
    )


def page_of_comparison(
    reference: tuple[str, Callable[..., Any]],
    candidate: tuple[str, Callable[..., Any]],
    *,
    inputs: Any,
    report: Report,
    found: Divergence | str | None,
    precision: str | None = None,
    command: str = "",
) -> Page:
    """The page of orepa verify A B. Each side: what it is called, and what runs it."""
    first, second = reference[0], candidate[0]
    sizes = []
    for name, side in (reference, candidate):
        if isinstance(side, nn.Module):
            sizes.append(measure_model(name, side, inputs))
        elif (file := side_file(name)).is_file():
            sizes.append(ModelSize.of_file(name, file))
    branches = next(
        (
            b
            for _, side in (reference, candidate)
            if isinstance(side, nn.Module) and (b := block_branches(side))
        ),
        (),
    )
    return Page(
        title=f"orepa verify {first} {second}",
        verdict="pass" if report else "mismatch",
        summary=report.verdict,
        first=first,
        links=(Link.of(second, first, report),),
        divergence=found,
        facts=comparison_facts(command, precision, report),
        sizes=tuple(sizes),
        branches=branches,
        absent=(
            ("certificate", "two sides were compared; orepa-export certifies a collapse"),
            ("branches", _NO_BLOCKS),
            ("audit", "orepa-export with --precision fp16 or bf16 makes one"),
            ("manifest", "two sides were compared; orepa-export writes a manifest"),
        ),
    )


@contextmanager
def not_run_page(path: Path | None, reference: str, candidate: str) -> Iterator[None]:
    """Where the comparison inside cannot be made, the page says so: no older one is left."""
    try:
        yield
    except NotVerified as error:
        if path:
            reason = str(error)
            absent = ("certificate", "divergence", "sizes", "branches", "audit", "manifest")
            page = Page(
                title=f"orepa verify {reference} {candidate}",
                verdict="not run",
                summary=reason,
                first=reference,
                links=(Link(candidate, reference, "not run", note=reason),),
                absent=tuple((section, "nothing was compared") for section in absent),
            )
            write_page(page, path)
        raise


def _found(steps: Sequence[ExportStep]) -> dict[str, Any]:
    """What the steps of any command tell."""
    outcome = _OUTCOMES[verdict(steps)]
    checks = [Check(s.name, s.verdict, finite(s.error), _note(s)) for s in steps]
    open_checks = [s for s in steps if s.verdict == "not run"]
    summary = "; ".join(complaints(steps)) or "everything that was compared agrees"
    scores = [f"{s.name.removeprefix('evaluate ')}: {s.note}" for s in steps if s.scores]
    summary = "; ".join([summary, *scores])
    divergences = [s.divergence for s in steps if s.divergence is not None]
    return {
        "verdict": outcome,
        "summary": summary,
        "missing": tuple(f"{step.name}: {_note(step)}" for step in open_checks),
        "checks": tuple(checks),
        "certificate": next((s.certificate for s in steps if s.certificate is not None), None),
        "divergence": next(iter(divergences), None),
        "audit": next((s.audit for s in steps if s.audit is not None), None),
    }


def _link(by_name: dict[str, ExportStep], form: str, against: str, name: str) -> Link:
    step = by_name.get(name)
    if step is None:
        return Link(form, against, "not run", note="an earlier step stopped it")
    if step.report is not None:
        return Link.of(form, against, step.report)
    outcome: Outcome = "not run" if step.verdict == "done" else step.verdict
    return Link(form, against, outcome, note=_note(step))


def _collapse_link(step: ExportStep) -> Link:
    """The collapse, by the certificate that the file holds: it is not made again."""
    if step.certificate is None:
        return _link({step.name: step}, "collapsed model", "model as loaded", step.name)
    error = max((block.error or 0.0 for block in step.certificate.blocks), default=None)
    outcome: Outcome = "pass" if step.certificate else "mismatch"
    note = "from the certificate in the file, block by block in float64; not computed again"
    return Link("collapsed model", "model as loaded", outcome, error, LIMIT, note)


def _file_sizes(steps: Sequence[ExportStep]) -> list[ModelSize]:
    forms = {"write onnx": "ONNX file", "build engine": "TensorRT engine"}
    forms |= {"write openvino": "OpenVINO file"}
    made = [(forms[step.name], step.file) for step in steps if step.name in forms]
    return [ModelSize.of_file(form, file) for form, file in made if file is not None]


def _recorded_sizes(path: Path, steps: Sequence[ExportStep]) -> tuple[ModelSize, ...]:
    """Of the files that are still what the manifest says."""
    forms = {"onnx file": "ONNX file", "engine file": "TensorRT engine"}
    return tuple(
        ModelSize.of_file(forms[step.name], step.file)
        for step in steps
        if step.name in forms and step.file is not None
    )


def _why_no_certificate(step: ExportStep | None) -> tuple[tuple[str, str], ...]:
    note = _note(step) if step is not None else "an earlier step stopped it"
    return (("certificate", note or "no certificate was made"),)


def _note(step: ExportStep) -> str:
    return step.note or (" ".join(str(step.cause).split()) if step.cause else "")
