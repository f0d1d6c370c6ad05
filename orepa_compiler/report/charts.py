"""Draws the charts of a page as inline SVG: no script, no font file, no address in them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from math import isfinite
from typing import Any

from orepa_compiler.dependencies import import_extra
from orepa_compiler.proving.certificate import LIMIT, BlockCertificate
from orepa_compiler.report.block_charts import BlockBranches
from orepa_compiler.verification.divergence import Divergence

EXTRA = "report"

_INK = "#010203"  # becomes the colour of the page's text, in the light and in the dark
_FINE, _WRONG = "#2f7ebc", "#d1495b"  # both are seen on white and on black
_LEAST_NORM = 1e-3  # of the norms: a branch that is zero lies on this edge
_LEAST, _MOST = 1e-18, 1e3  # of the errors that are drawn: 0 and inf have no place on a log axis
_LONGEST, _LONGEST_BRANCH = 30, 20  # characters

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "orepa",  # the same chart has the same bytes
    "text.parse_math": False,  # a $ in a module's name is a $
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
}


def block_errors(blocks: Sequence[BlockCertificate], name: str) -> str:
    """The float64 error of each block, a row each, on a log axis, with the limit as a line."""
    with _settings():
        figure = _figure(4.4, 0.9 + 0.2 * len(blocks))
        axes = figure.subplots()
        rows = range(len(blocks))
        for row, block in zip(rows, blocks, strict=True):
            if block.error is None:
                axes.text(2 * _LEAST, row, "not run", va="center", color=_WRONG)
                continue
            color, marker = (_WRONG, "X") if block.reason else (_FINE, "o")
            axes.plot([_LEAST, _drawn(block.error)], [row, row], color=color, lw=1, alpha=0.5)
            axes.plot(_drawn(block.error), row, marker, color=color, markersize=5)
        axes.axvline(LIMIT, color=_WRONG, ls="--", lw=1)
        axes.set_xscale("log")
        largest = max((_drawn(block.error or 0.0) for block in blocks), default=LIMIT)
        axes.set_xlim(_LEAST, max(10 * LIMIT, 10 * largest))
        _log_ticks(axes.xaxis, range(-18, 4, 3))
        axes.set_ylim(len(blocks) - 0.4, -0.6)
        axes.set_yticks(rows, [shortened(block.path) for block in blocks])
        axes.set_xlabel(f"error in float64 (dashed: the limit {LIMIT:g})")
        return _svg(figure, name, f"float64 error of {len(blocks)} blocks")


def error_map(divergence: Divergence, name: str) -> str:
    """The error of the first diverging module, position by position."""
    with _settings():
        figure = _figure(4.4, 3.5)
        axes = figure.subplots()
        rows = [[min(value, 1e300) for value in row] for row in divergence.error_map]
        image = axes.imshow(rows, cmap="magma", vmin=0, interpolation="nearest")
        figure.colorbar(image, label="error / largest value of the truth")
        axes.set(xlabel="column", ylabel="row")
        where = divergence.module or "the model itself"
        return _svg(figure, name, f"error over the feature map of {where}")


def similarity(block: BlockBranches, name: str) -> str:
    """The cosine of every two branches of a block (Hu et al. 2022, Fig. 7)."""
    with _settings():
        figure = _figure(3.4, 3.0)
        axes = figure.subplots()
        names = [shortened(branch, _LONGEST_BRANCH) for branch in block.snapshot.branches]
        mesh = axes.pcolormesh(
            block.snapshot.similarity, cmap="coolwarm", vmin=-1, vmax=1, edgecolors="white", lw=0.5
        )
        axes.invert_yaxis()
        axes.set_aspect("equal")
        places = [index + 0.5 for index in range(len(names))]
        # Numbers below: names there would take half of a phone's width.
        numbers = [str(number) for number in range(1, len(names) + 1)]
        axes.set_xticks(places, numbers)
        axes.set_yticks(places, [f"{n} {number}" for n, number in zip(names, numbers, strict=True)])
        figure.colorbar(mesh, label="cosine", location="bottom", shrink=0.8)
        return _svg(figure, name, f"similarity of the branches of {block.snapshot.path}")


def channel_norms(block: BlockBranches, name: str) -> str:
    """Each branch's L1 norm by output channel, sorted (Hu et al. 2022, S Fig. 3)."""
    with _settings():
        figure = _figure(3.4, 3.0)
        axes = figure.subplots()
        styles = ("-", "--", "-.", ":")
        for index, norms in enumerate(block.channel_norms):
            style = styles[index % len(styles)]  # not told apart by colour alone
            label = shortened(block.snapshot.branches[index], _LONGEST_BRANCH)
            drawn = [max(norm, _LEAST_NORM) for norm in norms]
            axes.plot(range(1, len(norms) + 1), drawn, style, lw=1.5, label=label)
        axes.set(xlabel="output channel, sorted", ylabel="L1 norm / largest", yscale="log")
        axes.set_ylim(_LEAST_NORM, 1.3)
        _log_ticks(axes.yaxis, range(-3, 1))
        figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
        return _svg(figure, name, f"sorted channel norms of the branches of {block.snapshot.path}")


def _log_ticks(axis: Any, powers: Sequence[int]) -> None:
    """Ticks as 1e-12: the usual ones are formulas, and a page's text is taken as it stands."""
    low, high = sorted(axis.get_view_interval())
    ticks = [10.0**power for power in powers if low <= 10.0**power <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def shortened(path: str, length: int = _LONGEST) -> str:
    """The end of a long path, which tells more than its beginning."""
    shown = path or "(root)"
    return shown if len(shown) <= length else f"…{shown[-length + 1 :]}"


def _drawn(error: float) -> float:
    return min(max(error, _LEAST), _MOST) if isfinite(error) else _MOST


def _settings() -> Any:
    return import_extra("matplotlib", extra=EXTRA).rc_context(_SETTINGS)


def _figure(width: float, height: float) -> Any:
    figures = import_extra("matplotlib.figure", extra=EXTRA)
    return figures.Figure((width, height), layout="constrained")


def _svg(figure: Any, name: str, label: str) -> str:
    """The figure as an <svg> element. name: what its ids begin with, so that no two charts share
    one. label: what is read out in its place.
    """
    page = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(page, format="svg", transparent=True, metadata=nothing)
    text = page.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows SVG without its address
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = text.replace(_INK, "currentColor")
    markup = import_extra("markupsafe", extra=EXTRA)
    return text.replace("<svg", f'<svg role="img" aria-label="{markup.escape(label)}"', 1)
