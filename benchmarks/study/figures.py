"""The figure of a question: differences with their intervals, or accuracy over the rates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.drawing import save
from benchmarks.study.report import Line
from benchmarks.study.statistics import Difference

_COLUMNS = 3  # panels side by side that a page can show
_COLOURS = {"better": "#2a7f3f", "worse": "#b3261e", "no difference shown": "#5f6368"}


def draw(found: list[Line], path: Path) -> None:
    """Writes the SVG, whole or not at all."""
    is_tuned = found[0].cell.question.is_tuned
    save(partial(_forest if is_tuned else _curves, found=found), path)


def _forest(pyplot: Any, found: list[Line]) -> Any:
    """A panel for each net: the mean difference of each arm and its interval."""
    nets = list(dict.fromkeys(line.cell.net for line in found))
    compared = [line for line in found if line.difference]
    # Where runs are missing a net lacks some of the names: each has its own height in all panels.
    names = list(dict.fromkeys(_name(line) for line in compared))[::-1]
    columns = min(len(nets), _COLUMNS)
    lines = -(-len(nets) // columns)
    size = (max(5.0, 3.1 * columns), lines * (1.2 + 0.3 * max(1, len(names))))
    shape = {"figsize": size, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(lines, columns, sharex=True, sharey=True, **shape)
    for axis in axes.flat[len(nets) :]:
        axis.remove()
    for axis, net in zip(axes.flat, nets, strict=False):
        for line in compared:
            if line.cell.net == net:
                _interval(axis, names.index(_name(line)), line.difference)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(net)
    figure.supxlabel("accuracy less the base's, points", fontsize=9)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(-0.6, len(names) - 0.4)
    return figure


def _interval(axis: Any, height: int, difference: Difference | None) -> None:
    assert difference is not None
    colour = _COLOURS[difference.verdict]
    axis.plot((difference.low, difference.high), (height, height), color=colour)
    axis.plot(difference.mean, height, "o", color=colour)


def _name(line: Line) -> str:
    return f"{line.cell.arm}\n{line.cell.setting}" if line.cell.setting else line.cell.arm


def _curves(pyplot: Any, found: list[Line]) -> Any:
    """Accuracy over the learning rate, an arm a line, with the spread over seeds."""
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for arm in dict.fromkeys(line.cell.arm for line in found):
        own = [line for line in found if line.cell.arm == arm]
        rates, means = [line.rate for line in own], [line.mean for line in own]
        (drawn,) = axis.plot(rates, means, "o-", label=arm)
        low, high = ([f(line.accuracies) for line in own] for f in (min, max))
        axis.fill_between(rates, low, high, color=drawn.get_color(), alpha=0.12)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("accuracy, per cent")
    axis.legend()
    return figure
