"""Plans: what a pass will do and what it leaves alone, with every reason, as plain data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import fx, nn

from orepa_compiler.errors import CheckpointError, ReparamError
from orepa_compiler.files.schemas import parsed, read_json

_FORMAT = 1
_ATTRIBUTE = "_orepa_plans"


@dataclass(frozen=True)
class Edit:
    """One rewrite. parameters, macs: before and after; macs per image, None where unknown.

    options: what the pass needs to apply it, JSON only; each pass reads its own back as a type.
    """

    done_by: str
    path: str
    before: str
    after: str
    parameters: tuple[int, int]
    macs: tuple[int, int] | None = None
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def option(self, name: str) -> Any:
        """One of the options. Raises ReparamError where a plan changed by hand has none."""
        if name not in self.options:
            message = f"the plan does not fit: its edit by {self.done_by} has no option {name!r}"
            raise ReparamError(message, path=self.path)
        return self.options[name]

    @property
    def cost(self) -> float:
        """How many times the MACs of what was there it takes."""
        return float(self.options.get("cost", 1))


@dataclass(frozen=True)
class Refusal:
    """A layer that a pass leaves alone, with the reason."""

    done_by: str
    path: str
    layer: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The edits and refusals of one or several passes; prints as a table, saves as JSON.

    checked: what was run to see that it is right, or why nothing was; "" for what was not applied.
    """

    edits: tuple[Edit, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    checked: str = ""

    def __add__(self, other: Plan) -> Plan:
        checked = self.checked or other.checked
        return Plan(self.edits + other.edits, self.refusals + other.refusals, checked)

    def of(self, done_by: str) -> Plan:
        """The part of the plan that one pass made."""
        return Plan(
            tuple(edit for edit in self.edits if edit.done_by == done_by),
            tuple(refusal for refusal in self.refusals if refusal.done_by == done_by),
            self.checked,
        )

    def with_macs(self, macs: Mapping[str, int]) -> Plan:
        """The plan with what each conv costs; a squeezed block costs the same, an offline one more.

        macs: by the path of the conv, for one image.
        """
        edits = [
            replace(edit, macs=(cost, round(cost * edit.cost)))
            if (cost := macs.get(edit.path))
            else edit
            for edit in self.edits
        ]
        return Plan(tuple(edits), self.refusals, self.checked)

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that to_json wrote. Raises CheckpointError for anything else."""
        data = parsed(text, what="this is not a plan", error=CheckpointError)
        if "format" not in data:
            raise CheckpointError("this is not a plan: format is missing")
        if data["format"] != _FORMAT:
            raise CheckpointError(
                f"the plan has format {data['format']!r}, this version reads {_FORMAT}; "
                "use the version of orepa-compiler that wrote it"
            )
        return read_json(text, cls, what="this is not a plan", error=CheckpointError)

    def __rich__(self) -> Group:
        parts: list[Any] = [Text(self.summary(), style="bold")]
        shown = [edit for edit in self.edits if edit.done_by != "squeeze"]
        if shown:
            parts.append(_edit_table(shown))
        if self.refusals:
            parts.append(_refusal_table(self.refusals))
        return Group(*parts)

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120, color_system=None)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def summary(self) -> str:
        """One line: how many edits of each pass, how many layers left alone, what was checked."""
        tail = f"; {self.checked}" if self.checked else ""
        if not self.edits and not self.refusals:
            return f"Nothing to do: no conv, no norm behind a conv, no block{tail}."
        counts = Counter(edit.done_by for edit in self.edits)
        parts = [f"{name} {count}" for name, count in counts.items()]
        before, after = (
            sum(edit.parameters[i] for edit in self.edits if edit.done_by != "squeeze")
            for i in (0, 1)
        )
        parts.append(f"left alone {len(self.refusals)}")
        changed = f"; their parameters {before:,} -> {after:,}" if self.edits else ""
        return f"Plan: {', '.join(parts)}{changed}{tail}"


def record_plan(model: nn.Module, plan: Plan) -> None:
    """Keeps the plan with the model, so that a checkpoint can tell how to rebuild it."""
    plans = (*recorded_plans(model), plan)
    vars(model)[_ATTRIBUTE] = plans
    if isinstance(model, fx.GraphModule):  # it copies its meta, not attributes
        model.meta = {**model.meta, _ATTRIBUTE: plans}


def recorded_plans(model: nn.Module) -> tuple[Plan, ...]:
    """Gives the plans that made this model, in order; none for a model as its class built it.

        print(orepa.recorded_plans(deploy)[-1])

    They stay with the model, and in what orepa.save writes.
    """
    meta = vars(model).get("meta")
    inside: Any = meta.get(_ATTRIBUTE, ()) if isinstance(meta, dict) else ()
    plans: tuple[Plan, ...] = vars(model).get(_ATTRIBUTE, inside)
    return plans


def _edit_table(edits: list[Edit]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("pass", "path", "before", "after"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "MACs"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for edit in edits:
        table.add_row(
            edit.done_by,
            edit.path or "(root)",
            edit.before,
            edit.after,
            " -> ".join(map(short_number, edit.parameters)),
            "-" if edit.macs is None else short_number(edit.macs[1]),
            edit.note,
        )
    return table


def short_number(value: int) -> str:
    """Three digits and a unit: 9408 is 9.41 k."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _refusal_table(refusals: tuple[Refusal, ...]) -> Table:
    """Left alone, one row for each reason."""
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("left alone", justify="right")
    for column in ("why", "where"):
        table.add_column(column, overflow="fold")
    groups: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        groups.setdefault(refusal.reason, []).append(refusal)
    for reason, group in groups.items():
        names = [refusal.path or "(root)" for refusal in group]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        table.add_row(str(len(group)), reason, shown)
    return table
