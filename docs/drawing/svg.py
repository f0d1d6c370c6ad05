"""Graphs as SVG, side by side: what a pass is given, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as Xml

from docs.drawing.graphs import Graph, Kind
from docs.drawing.layout import Layout, Point, laid_out

WIDTH, HEIGHT = 118, 26  # of a box
COLUMN, ROW = 130, 50  # from box to box
MARGIN, TITLE, GAP = 18, 24, 40
WIDEST = 1200  # of graphs beside one another
# Feature maps are blue and green, kernels orange: as much of the page as the squeeze takes away.
COLOURS: dict[Kind, str] = {
    "conv": "#cfe2ff",
    "norm": "#d3f0d8",
    "other": "#eceff1",
    "kernel": "#ffe0b8",
}


def side_by_side(graphs: Sequence[tuple[str, Graph]], about: str) -> str:
    """One SVG with the graphs, each below its title; one below the other where they are wide.

    about: what a screen reader says of it.
    """
    drawn = [(title, graph, laid_out(graph)) for title, graph in graphs]
    sizes = [(_width(layout), TITLE + layout.rows * ROW + MARGIN) for _, _, layout in drawn]
    across = sum(width for width, _ in sizes) + GAP * (len(sizes) - 1)
    is_wide = across > WIDEST
    width = max(width for width, _ in sizes) if is_wide else across
    height = sum(height for _, height in sizes) if is_wide else max(h for _, h in sizes)
    root = Xml.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width + 2 * MARGIN:g} {height + MARGIN:g}",
        role="img",
        attrib={"font-family": "sans-serif", "font-size": "13"},
    )
    Xml.SubElement(root, "title").text = about
    _rectangle(root, 0, 0, width + 2 * MARGIN, height + MARGIN, fill="#ffffff", rx="8")
    left, top = float(MARGIN), float(MARGIN)
    for (title, graph, layout), (own, below) in zip(drawn, sizes, strict=True):
        heading = Xml.SubElement(root, "text", x=f"{left:g}", y=f"{top + 14:g}", fill="#37474f")
        heading.set("font-weight", "bold")
        heading.text = title
        _draw(root, graph, layout, left, top + TITLE)
        left, top = (left, top + below) if is_wide else (left + own + GAP, top)
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode") + "\n"


def _width(layout: Layout) -> float:
    first, last = layout.columns
    return (last - first) * COLUMN + WIDTH


def _draw(root: Xml.Element, graph: Graph, layout: Layout, left: float, top: float) -> None:
    first, _ = layout.columns

    def at(point: Point) -> Point:
        column, row = point
        return left + WIDTH / 2 + (column - first) * COLUMN, top + (row + 0.5) * ROW

    for line in layout.lines:
        _curve(root, [at(point) for point in line])
    for node, place in zip(graph.nodes, layout.places, strict=True):
        x, y = at(place)
        colour = COLOURS[node.kind]
        _rectangle(root, x - WIDTH / 2, y - HEIGHT / 2, WIDTH, HEIGHT, fill=colour, rx="6")
        text = Xml.SubElement(root, "text", x=f"{x:g}", y=f"{y + 4.5:g}", fill="#263238")
        text.set("text-anchor", "middle")
        text.text = node.text


def _curve(root: Xml.Element, points: list[Point]) -> None:
    """From below the first point to above the last, straight down between."""
    (x, y), (via, bend), (end, last) = points
    half = HEIGHT / 2
    path = f"M{x:g} {y + half:g}"
    if bend > y:
        path += f" C{x:g} {y + ROW / 2:g} {via:g} {y + ROW / 2:g} {via:g} {y + ROW - half:g}"
        path += f" L{via:g} {bend + half:g}"
        x, y = via, bend
    path += f" C{x:g} {y + ROW / 2:g} {end:g} {last - ROW / 2:g} {end:g} {last - half:g}"
    Xml.SubElement(root, "path", {"d": path, "fill": "none", "stroke": "#90a4ae"})


def _rectangle(
    root: Xml.Element, x: float, y: float, width: float, height: float, **options: str
) -> None:
    sizes = {"x": x, "y": y, "width": width, "height": height}
    Xml.SubElement(root, "rect", {key: f"{value:g}" for key, value in sizes.items()} | options)
