"""The figure of a question: the difference of each arm to the base, along the budget."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.drawing import save
from benchmarks.study.report import ALL_NETS, Line

_COLUMNS = 4  # panels side by side that a page can show
_COLOUR = "#2a5f9e"


def draw(found: list[Line], path: Path) -> None:
    """Writes the SVG, whole or not at all."""
    save(partial(_gains, found=found), path)


def _gains(pyplot: Any, found: list[Line]) -> Any:
    """A panel for each net: the mean difference of each arm and its interval, over the epochs."""
    compared = [line for line in found if line.difference and line.cell.net != ALL_NETS]
    nets = list(dict.fromkeys(line.cell.net for line in compared)) or [""]
    columns = min(len(nets), _COLUMNS)
    rows = -(-len(nets) // columns)
    shape = {"figsize": (max(4.0, 2.6 * columns), 2.6 * rows), "layout": "constrained"}
    figure, axes = pyplot.subplots(rows, columns, sharey=True, squeeze=False, **shape)
    for axis in axes.flat[len(nets) :]:
        axis.remove()
    for axis, net in zip(axes.flat, nets, strict=False):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(net)
        _curve(axis, [line for line in compared if line.cell.net == net])
    figure.supxlabel("epochs", fontsize=9)
    figure.supylabel("accuracy minus plain's, points", fontsize=9)
    return figure


def _curve(axis: Any, own: list[Line]) -> None:
    own = sorted(own, key=lambda line: line.cell.fields["epochs"])
    epochs = [line.cell.fields["epochs"] for line in own]
    differences = [line.difference for line in own if line.difference]
    low, high = ([getattr(d, side) for d in differences] for side in ("low", "high"))
    axis.plot(epochs, [d.mean for d in differences], "o-", color=_COLOUR)
    axis.vlines(epochs, low, high, color=_COLOUR)
    axis.set_xticks(epochs, [str(n) for n in epochs])
    axis.minorticks_off()
