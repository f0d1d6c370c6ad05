"""Prints a plan in 80 columns: a row for each conv, or for each stage of the net."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from orepa_compiler.planning import Edit, Plan, Refusal, short_number

WIDTH = 80

# A path that is longer has a line of its own, so that it can be copied.
MOST_OF_PATH = 34


def plan_text(plan: Plan) -> str:
    """Every conv with its block, then what is left alone, by reason."""
    shown = [edit for edit in plan.edits if edit.done_by != "squeeze"]
    rows = [_row(edit) for edit in shown]
    header = ("path", "conv", "block", "parameters", "step")
    return "\n".join([*_summary(plan), *_aligned(header, rows), *_left_alone(plan.refusals)])


def summary_text(plan: Plan) -> str:
    """A row for each stage (the first part of the path, with its number), and the reasons."""
    stages: dict[str, list[Edit]] = {}
    for edit in plan.edits:
        if edit.done_by != "squeeze":
            stages.setdefault(_stage(edit.path), []).append(edit)
    rows = [(name, *_total(edits)) for name, edits in stages.items()]
    header = ("stage", "convs", "blocks", "parameters", "MACs")
    return "\n".join([*_summary(plan), *_aligned(header, rows), *_left_alone(plan.refusals)])


def _summary(plan: Plan) -> list[str]:
    return textwrap.wrap(plan.summary(), WIDTH, subsequent_indent="  ")


def _stage(path: str) -> str:
    first, *rest = path.split(".") if path else ["(root)"]
    return f"{first}.{rest[0]}" if rest and rest[0].isdecimal() else first


def _total(edits: Sequence[Edit]) -> tuple[str, str, str, str]:
    blocks = sorted({_block(edit) for edit in edits})
    before, after = (sum(edit.parameters[i] for edit in edits) for i in (0, 1))
    macs = [edit.macs[1] for edit in edits if edit.macs is not None]
    return (
        str(len(edits)),
        ", ".join(blocks),
        f"{short_number(before)} -> {short_number(after)}",
        short_number(sum(macs)) if macs else "-",
    )


def _row(edit: Edit) -> tuple[str, str, str, str, str]:
    before, after = map(short_number, edit.parameters)
    words = [part.strip() for part in edit.note.split(";")]
    step = next((word.split(" ")[0] for word in words if word.startswith(("+", "-"))), "")
    return (edit.path or "(root)", _conv(edit), _block(edit), f"{before} -> {after}", step)


def _conv(edit: Edit) -> str:
    """`24 -> 16 3x3 /2`: what kind of layer it is, the path and the block say."""
    kind, _, rest = edit.before.partition(" ")
    text = rest if kind == "Conv2d" and rest else edit.before
    depthwise = f" groups {text.partition(' ')[0]}"
    return text.removesuffix(depthwise) + " dw" if text.endswith(depthwise) else text


def _block(edit: Edit) -> str:
    return edit.after.partition(",")[0]


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """The rows under one another; a long path stands on the line above its row."""
    if not rows:
        return
    yield ""
    short = [row[0] for row in rows if len(row[0]) <= MOST_OF_PATH]
    widths = [max(map(len, (header[0], *short)))]
    widths += [max(len(row[i]) for row in (header, *rows)) for i in range(1, len(header))]
    if sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[0] = max(4, WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    for row in (header, *rows):
        first = row[0]
        if len(first) > widths[0]:
            yield first
            first = ""
        cells = [first.ljust(widths[0])]
        cells += [
            cell.rjust(width) if header[i] in ("convs", "MACs", "step") else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row[1:], widths[1:], strict=True), start=1)
        ]
        yield "  ".join(cells).rstrip()


def _left_alone(refusals: Sequence[Refusal]) -> Iterable[str]:
    groups: dict[str, list[str]] = {}
    for refusal in refusals:
        groups.setdefault(refusal.reason, []).append(refusal.path or "(root)")
    if groups:
        yield ""
        yield "left alone:"
    for reason, paths in groups.items():
        shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        text = f"{len(paths)}: {reason} ({shown})"
        yield from textwrap.wrap(
            text,
            WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
