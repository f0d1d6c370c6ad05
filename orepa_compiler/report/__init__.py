"""Writes the report of an export or a comparison: one HTML file that needs no network."""

from orepa_compiler.report.block_charts import BlockBranches, block_branches
from orepa_compiler.report.page import Link, Outcome, Page
from orepa_compiler.report.rendering import check_extra, render_page, write_page
from orepa_compiler.report.sizes import ModelSize, measure_model

__all__ = [
    "BlockBranches",
    "Link",
    "ModelSize",
    "Outcome",
    "Page",
    "block_branches",
    "check_extra",
    "measure_model",
    "render_page",
    "write_page",
]
