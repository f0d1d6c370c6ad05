"""The rows as the tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_day.rows import Row, Scale, rows, step_name

BEGIN, END = "<!-- gpu day: begin -->\n", "<!-- gpu day: end -->\n"


def page(made: Sequence[Row], facts: dict[str, Any]) -> str:
    """Equality first, then steps beside the plain model's; what was not run says so."""
    known = {row.name: row for row in made}
    named = [known.get(name, Row(name)) for name, _ in rows("cuda", Scale())]
    steps = [row for row in named if row.name.startswith("step, resnet")]
    others = [row for row in named if row not in steps]
    where = facts.get("gpu", "no GPU was available")
    return (
        f"{where}, torch {facts.get('torch', '-')}\n\n"
        f"{_table(('row', 'state', 'figures'), [_line(row) for row in others])}\n"
        f"{_table(('step in bf16', 'ms', '/ plain', 'MB', '/ plain'), _steps(known))}"
    )


def _line(row: Row) -> tuple[str, ...]:
    figures = "; ".join(f"{name} {_text(value)}" for name, value in row.figures.items())
    state = row.state if row.state == "done" else f"{row.state}: {row.reason}"
    return row.name, state, figures or "-"


def _steps(known: dict[str, Row]) -> list[tuple[str, ...]]:
    scale = Scale()
    lines = []
    for model in scale.models:
        for batch in scale.batches:
            plain = known.get(step_name(model, batch, "plain"), Row("")).figures
            prefix = step_name(model, batch, "")
            names = [name for name, _ in rows("cuda", scale) if name.startswith(prefix)]
            for name in names:
                row = known.get(name, Row(name))
                cells = [cell for key in ("ms", "MB") for cell in _pair(row, plain, key)]
                lines.append((name.removeprefix("step, "), *cells))
    return lines


def _pair(row: Row, plain: dict[str, float | str], key: str) -> tuple[str, str]:
    own, base = row.figures.get(key), plain.get(key)
    if not isinstance(own, float):
        return row.state if row.state != "done" else "-", "-"
    return f"{own:.1f}", f"{own / base:.3f}" if isinstance(base, float) else "-"


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2g}"


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"
