"""Defines what stands on a page: the verdict, the chain of forms, and what each step found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orepa_compiler.export.audit import HalfAudit
from orepa_compiler.export.manifest import Check, Manifest
from orepa_compiler.proving.certificate import Certificate
from orepa_compiler.report.block_charts import BlockBranches
from orepa_compiler.report.sizes import ModelSize
from orepa_compiler.verification import Report
from orepa_compiler.verification.divergence import Divergence

Outcome = Literal["pass", "mismatch", "failed", "not run"]


@dataclass(frozen=True)
class Link:
    """One step from form to form: `form` compared with the form named `against`.

    error, tolerance: as in a Row; None where nothing was measured. note: why it was not run, or
    what else to know. report: the comparison itself, row by row.
    """

    form: str
    against: str
    verdict: Outcome
    error: float | None = None
    tolerance: float | None = None
    note: str = ""
    report: Report | None = None

    @classmethod
    def of(cls, form: str, against: str, report: Report) -> Link:
        """The link that a comparison is, with the numbers of its worst row."""
        worst = report.worst
        return cls(
            form,
            against,
            "pass" if report else "mismatch",
            worst.error if worst else None,
            worst.tolerance if worst else None,
            "" if report else report.verdict,
            report,
        )


@dataclass(frozen=True)
class Page:
    """A whole page. What is None or empty is said to be absent, with the reason in `absent`.

    summary: the verdict in a line or two. facts: what was made and how, by name; a text for each.
    missing: what was not run, a line each, shown beside the verdict, which is then a pass in part.
    first: the first form of the chain. divergence: a text where the place of a difference
    cannot be told. absent: section -> why it is empty, for certificate, divergence, sizes,
    branches, audit, manifest.
    """

    title: str
    verdict: Outcome
    summary: str
    first: str
    links: tuple[Link, ...]
    missing: tuple[str, ...] = ()
    facts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    checks: tuple[Check, ...] = ()
    certificate: Certificate | None = None
    divergence: Divergence | str | None = None
    sizes: tuple[ModelSize, ...] = ()
    branches: tuple[BlockBranches, ...] = ()
    audit: HalfAudit | None = None
    manifest: Manifest | None = None
    absent: tuple[tuple[str, str], ...] = ()

    @property
    def headline(self) -> str:
        """The verdict as it stands on top: a pass of some checks is none of those not run."""
        return "pass in part" if self.verdict == "pass" and self.missing else self.verdict
