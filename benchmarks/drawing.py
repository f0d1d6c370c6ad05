"""How a figure of a page is written: as SVG, whole or not at all, and the same bytes each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orepa_compiler.files.atomic import staged

# Matplotlib writes the time, and ids drawn at random, unless told not to: a page made again from
# the same records is the same page.
_SAVED = {"format": "svg", "metadata": {"Date": None}, "bbox_inches": "tight"}


def save(draw: Callable[[Any], Any], path: Path) -> None:
    """Writes the figure that `draw` makes with matplotlib's pyplot."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"svg.hashsalt": path.stem, "font.size": 9}):
        figure = draw(pyplot)
        with staged(path) as draft:
            figure.savefig(draft, **_SAVED)
        pyplot.close(figure)
