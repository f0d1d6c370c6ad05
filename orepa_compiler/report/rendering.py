"""Renders a page as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from orepa_compiler.dependencies import import_extra
from orepa_compiler.export.audit import NEAREST, AuditRow, HalfAudit
from orepa_compiler.files.atomic import staged
from orepa_compiler.proving.certificate import LIMIT, BlockCertificate
from orepa_compiler.report import charts
from orepa_compiler.report.block_charts import BlockBranches
from orepa_compiler.report.page import Page
from orepa_compiler.verification import Row
from orepa_compiler.verification.divergence import Divergence

# What is drawn or listed; a page says how much there is beside it.
MOST_BLOCKS, MOST_BRANCHED, MOST_ROWS = 60, 12, 40

_TEMPLATE = Path(__file__).with_name("page.html.j2")
_MARKS = {
    **{"pass": "✓", "done": "✓", "mismatch": "✗", "failed": "✗", "not run": "–"},
    "pass in part": "–",
}


def check_extra() -> None:
    """Raises MissingPackage where the packages that draw a page are not installed."""
    for package in ("jinja2", "matplotlib"):
        import_extra(package, extra=charts.EXTRA)


def write_page(page: Page, path: str | Path) -> Path:
    """Writes the page, whole or not at all: one file, no script, no network. Returns its path.

    Raises MissingPackage without jinja2 and matplotlib, ExportError where it cannot be written.
    """
    target, text = Path(path), render_page(page)
    with staged(target) as draft:
        draft.write_text(text, encoding="utf-8")
    return target


def render_page(page: Page) -> str:
    """Gives the text of the page. Whatever it shows of the user's (paths, names, notes) is escaped.

    Raises MissingPackage without jinja2 and matplotlib.
    """
    check_extra()
    jinja2 = import_extra("jinja2", extra=charts.EXTRA)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Callable[..., Any]] = {
        "error": lambda value: "-" if value is None else f"{value:.1e}" if value else "0",
        "count": lambda value: "-" if value is None else f"{value:,}",
        "amount": _amount,
        "given": _given,
    }
    environment.filters |= filters
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return str(template.render(page=page, marks=_MARKS, limit=LIMIT, **_drawn(page)))


def _given(options: Mapping[str, Any]) -> dict[str, str]:
    """Leaves out the options that were not given, and writes the values of the others."""
    shown: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            shown |= _given(value)
        elif isinstance(value, (list, tuple)) and value:
            shown[name] = ", ".join(map(str, value))
        elif value is not None and value is not False and value not in ("", [], ()):
            shown[name] = "yes" if value is True else str(value)
    return shown


def _amount(value: int | None) -> str:
    """Writes a number in at most seven characters, as a phone has room for."""
    if value is None:
        return "-"
    for unit, size in ((" G", 1e9), (" M", 1e6)):
        if value >= size:
            return f"{value / size:,.1f}{unit}"
    return f"{value:,}"


def _drawn(page: Page) -> dict[str, Any]:
    """The charts, and what is shown of long tables."""
    # Compared with None: a certificate or an audit that found something wrong is false.
    names = (f"c{number}" for number in count())
    worst = _worst(() if page.certificate is None else page.certificate.blocks)
    branched = _closest(page.branches)
    found = page.divergence
    has_map = isinstance(found, Divergence) and bool(found.error_map)
    return {
        "absent": dict(page.absent),
        "blocks": worst,
        "block_chart": charts.block_errors(worst, next(names)) if worst else "",
        "map_chart": charts.error_map(found, next(names)) if has_map else "",  # type: ignore[arg-type]
        "branched": [
            (
                block.snapshot.path,
                charts.similarity(block, next(names)),
                charts.channel_norms(block, next(names)),
            )
            for block in branched
        ],
        "audit_rows": [] if page.audit is None else _audit_rows(page.audit),
        "compared": [
            (link, _rows(link.report.rows)) for link in page.links if link.report is not None
        ],
    }


def _worst(blocks: Sequence[BlockCertificate]) -> list[BlockCertificate]:
    """The blocks to show, in the model's order: those that fail first, then by their error."""
    ranked = sorted(blocks, key=lambda block: (not block.reason, -(block.error or 0.0)))
    kept = {id(block) for block in ranked[:MOST_BLOCKS]}
    return [block for block in blocks if id(block) in kept]


def _closest(blocks: Sequence[BlockBranches]) -> list[BlockBranches]:
    """The blocks to draw, in the model's order: those with two branches that agree most."""
    ranked = sorted(blocks, key=lambda block: -abs(block.snapshot.closest[0]))
    kept = {id(block) for block in ranked[:MOST_BRANCHED]}
    return [block for block in blocks if id(block) in kept]


def _rows(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.ok)[:MOST_ROWS]


def _audit_rows(audit: HalfAudit) -> list[AuditRow]:
    fine = sorted((row for row in audit.rows if not row.problem), key=lambda row: -row.largest)
    problems = sorted(audit.problems, key=lambda row: -row.largest)
    return [*problems[:MOST_ROWS], *fine[:NEAREST]]
