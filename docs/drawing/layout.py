"""Where the boxes of a graph go: a row for each step, and parallel branches side by side."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from docs.drawing.graphs import Graph

Point = tuple[float, float]  # column and row


@dataclass(frozen=True)
class Layout:
    """places: the centre of each box. lines: for each edge, the points that it passes."""

    places: list[Point]
    lines: list[list[Point]]

    @property
    def columns(self) -> tuple[float, float]:
        """The first and the last column, long edges included."""
        at = [column for line in [self.places, *self.lines] for column, _ in line]
        return min(at), max(at)

    @property
    def rows(self) -> int:
        return 1 + int(max(row for _, row in self.places))


def laid_out(graph: Graph) -> Layout:
    """A box stands below all that it reads; the readers of one box are spread around it.

    Boxes that read nothing are spread around column 0. A line that skips rows keeps the column in
    which it starts, and one that joins others ends in the middle of them.
    """
    rows = _rows(graph)
    readers: list[list[int]] = [[] for _ in graph.nodes]
    for number, node in enumerate(graph.nodes):
        for source in node.inputs:
            readers[source].append(number)
    sources = [number for number, node in enumerate(graph.nodes) if not node.inputs]
    columns: list[float] = []
    for number, node in enumerate(graph.nodes):
        if node.inputs:
            columns.append(mean(_spread(columns[s], readers[s], number) for s in node.inputs))
        else:
            columns.append(_spread(0.0, sources, number))
    places = [(column, float(row)) for column, row in zip(columns, rows, strict=True)]
    lines = [
        [places[source], (_spread(columns[source], readers[source], number), above), places[number]]
        for number, node in enumerate(graph.nodes)
        for above in (rows[number] - 1.0,)
        for source in node.inputs
    ]
    return Layout(places, lines)


def _rows(graph: Graph) -> list[int]:
    rows: list[int] = []
    for node in graph.nodes:
        rows.append(1 + max((rows[source] for source in node.inputs), default=-1))
    return rows


def _spread(centre: float, those: list[int], one: int) -> float:
    """The column of one of several boxes that stand side by side around a centre."""
    return centre + those.index(one) - (len(those) - 1) / 2
