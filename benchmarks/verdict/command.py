"""The command: every fault and every right pair, judged, and the table in docs/verification.md."""

from __future__ import annotations

import json
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.verdict.faults import Fault, faults, passes
from benchmarks.verdict.pairs import Pair, judged, pairs
from orepa_compiler.errors import ReparamError
from orepa_compiler.files.atomic import staged

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- python -m benchmarks.verdict -->", "<!-- end -->"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Tally:
    """How many of a kind were tried, and which of them went wrong."""

    kind: str
    tried: int
    wrong: tuple[str, ...]


@app.command()
def verdict(
    seeds: Annotated[int, typer.Option(min=1, help="Of each family of nets.")] = 6,
    output: Annotated[Path, typer.Option()] = ROOT / "benchmarks/results/verdict.json",
    docs: Annotated[Path, typer.Option()] = ROOT / "docs/verification.md",
) -> None:
    """Judge every fault and every right pair. The exit code is 1 where one verdict was wrong."""
    warnings.simplefilter("ignore")
    console = Console(stderr=True)
    missed = try_faults(faults(), console)
    failed = try_pairs(pairs(seeds), console)
    facts = {
        "command": f"python -m benchmarks.verdict {shlex.join(sys.argv[1:])}".strip(),
        "torch": torch.__version__,
    }
    data = {**facts, "faults": [vars(t) for t in missed], "pairs": [vars(t) for t in failed]}
    with staged(output) as draft:
        draft.write_text(json.dumps(data, indent=1) + "\n")
    with staged(docs) as draft:
        draft.write_text(with_table(docs.read_text(), missed, failed, facts))
    raise typer.Exit(1 if any(tally.wrong for tally in (*missed, *failed)) else 0)


def try_faults(tried: Iterable[Fault], console: Console) -> list[Tally]:
    """By kind of net, the faults that a verdict let pass."""
    count: Counter[str] = Counter()
    missed: dict[str, list[str]] = {}
    for fault in tried:
        count[fault.kind] += 1
        if passes(fault):
            missed.setdefault(fault.kind, []).append(fault.name)
            console.print(f"missed {fault}")
    return _tallies(count, missed)


def try_pairs(tried: Iterable[Pair], console: Console) -> list[Tally]:
    """By family and precision, the right pairs that a verdict failed, or could not judge."""
    count: Counter[str] = Counter()
    failed: dict[str, list[str]] = {}
    for pair in tried:
        kind = f"{pair.family}, {pair.precision}"
        count[kind] += 1
        try:
            said = "" if (report := judged(pair)) else report.verdict
        except ReparamError as error:
            said = str(error)
        if said:
            failed.setdefault(kind, []).append(f"{pair}: {said}")
            console.print(f"failed {pair}: {said}")
    return _tallies(count, failed)


def _tallies(count: Mapping[str, int], wrong: Mapping[str, list[str]]) -> list[Tally]:
    return [Tally(kind, tried, tuple(wrong.get(kind, ()))) for kind, tried in count.items()]


def with_table(
    text: str, missed: list[Tally], failed: list[Tally], facts: Mapping[str, Any]
) -> str:
    """The page with the table between its marks."""
    lines = [
        f"Faults: {_total(missed)} tried, {_total(missed) - _wrong(missed)} caught. "
        f"Right pairs: {_total(failed)} tried, {_wrong(failed)} failed. "
        f"`{facts['command']}`, torch {facts['torch']}, on a CPU.",
        "",
        "| faults in | tried | caught |",
        "|---|---|---|",
        *(f"| {t.kind} | {t.tried} | {t.tried - len(t.wrong)} |" for t in missed),
        "",
        "| right pairs | float64 | float32 | bfloat16 | float16 | failed |",
        "|---|---|---|---|---|---|",
        *_rows(failed),
    ]
    table = "\n".join([BEGIN, "", *lines, "", END])
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: table, text, flags=re.DOTALL)


def _rows(failed: list[Tally]) -> Iterable[str]:
    by_kind = {tally.kind: tally for tally in failed}
    for family in dict.fromkeys(tally.kind.rpartition(", ")[0] for tally in failed):
        found = [by_kind.get(f"{family}, {p}") for p in ("float64", "float32", "bf16", "fp16")]
        tried = [str(tally.tried) if tally else "0" for tally in found]
        wrong = sum(len(tally.wrong) for tally in found if tally)
        yield f"| {family} | {' | '.join(tried)} | {wrong} |"


def _total(tallies: list[Tally]) -> int:
    return sum(tally.tried for tally in tallies)


def _wrong(tallies: list[Tally]) -> int:
    return sum(len(tally.wrong) for tally in tallies)
