"""Pages to draw: one with everything on it, under hostile names, and one with nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.export.audit import AuditRow, HalfAudit
from orepa_compiler.export.manifest import Check, FileRecord, Manifest
from orepa_compiler.proving.certificate import BlockCertificate, Certificate
from orepa_compiler.report import Link, ModelSize, Page, block_branches, measure_model
from orepa_compiler.verification import verify_callables
from orepa_compiler.verification.divergence import Divergence

# Every way out of a text: an element, an attribute, a comment, a formula.
HOSTILE = "<script>alert(1)</script>\"'--> $x_{$ {{ 1 }} &lt;"


def block(path: str, error: float | None, inexact: str = "") -> BlockCertificate:
    return BlockCertificate(path, "OREPA", "Conv2d", error, error, 0.0, inexact, "aa", "bb")


def expanded() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    )
    return orepa.expand(net, block=orepa.OREPA)


def inputs() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def full_page() -> Page:
    model = expanded()
    deploy, batch = orepa.collapse(model), inputs()
    wrong = orepa.collapse(expanded())
    bump = tuple(tuple(float(r == 0) * 0.5 for _ in range(8)) for r in range(8))
    blocks = [block(f"{HOSTILE}.{i}", 10.0**-i) for i in range(10, 17)]
    return Page(
        title=HOSTILE,
        verdict="mismatch",
        summary=f"{HOSTILE} differs",
        first="expanded model",
        links=(
            Link.of("collapsed model", "expanded model", verify_callables(model, deploy, batch)),
            Link.of(HOSTILE, "collapsed model", verify_callables(deploy, wrong, batch)),
            Link("TensorRT engine", "collapsed model", "not run", note="device numerics: not run"),
        ),
        missing=(f"engine: {HOSTILE}",),
        checks=(Check(HOSTILE, "done", None, HOSTILE), Check("check", "pass", 1e-7)),
        certificate=Certificate((*blocks, block("silent", None), block("zero", 0.0))),
        divergence=Divergence(HOSTILE, "Conv2d", (1, 8, 8, 8), "error", 3, 0.5, 1e-5, 0.5, 0, bump),
        sizes=(
            measure_model(HOSTILE, model, batch),
            ModelSize(HOSTILE, None, None, None, None, None, 12345),
        ),
        branches=block_branches(model),
        audit=HalfAudit("fp16", (AuditRow(HOSTILE, "output", 1e6, 0.0, 1e-3, "overflow"),), ("a",)),
        manifest=Manifest(
            "2026-01-01", (FileRecord("onnx", HOSTILE, 5, "ab" * 32),), {"model": HOSTILE}, ()
        ),
    )


def empty_page(**changed: object) -> Page:
    values: dict = {"title": "t", "verdict": "not run", "summary": "s", "first": "a", "links": ()}
    return Page(**{**values, **changed})
