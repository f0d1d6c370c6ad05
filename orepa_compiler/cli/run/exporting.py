"""orepa-export, once its options are known to be right: the steps, and what is written of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orepa_compiler.cli.given.export_request import ExportRequest
from orepa_compiler.cli.given.images import ImageOptions
from orepa_compiler.cli.run.stages import export_steps
from orepa_compiler.cli.shown.pages import page_of_export
from orepa_compiler.cli.shown.summary import finish, report_of, write_json
from orepa_compiler.report import write_page


def run_export(
    options: Mapping[str, Any], *, json: Path | None, junit: Path | None, debug: bool
) -> int:
    """The exit code of an export, after its files are written and its table is shown."""
    images = ImageOptions.read(**options["images"])
    request = ExportRequest(**{**options, "images": images})
    request.check()
    steps = export_steps(request)
    if json:
        write_json(json, report_of(request, steps))
    if request.report:
        write_page(page_of_export(request, steps), request.report)
    return finish("orepa-export", steps, junit, debug)
