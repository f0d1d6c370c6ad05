"""python -m benchmarks.int8: makes what is missing, and writes the table."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.int8.files import accuracy, time_ratio
from benchmarks.int8.methods import FORMS, METHODS, PRETRAINED, Setting, setting_of, trained
from benchmarks.int8.report import write_page

ROOT = Path(__file__).parents[2]

app = typer.Typer(add_completion=False)


@app.command()
def int8(
    net: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(FORMS)}.")] = None,
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 10,
    most: Annotated[int | None, typer.Option(help="No more than so many runs now.")] = None,
    timed: Annotated[bool, typer.Option(help="Time the files too: on a calm machine.")] = False,
    summary: Annotated[bool, typer.Option(help="Make no run; write from what is there.")] = False,
    records: Annotated[Path, typer.Option()] = ROOT / "benchmarks/results/int8.jsonl",
    docs: Annotated[Path, typer.Option()] = ROOT / "docs/int8.md",
) -> None:
    """Train each net in float, and make a file of it in each way.

    A run is one net and one seed, a line of the records, written as it ends: what was stopped goes
    on. The images are those of Debian's dataset-fashion-mnist.
    """
    torch.set_num_threads(1)
    console = Console()
    known = _read(records)
    nets = net or [name for name in FORMS if name != PRETRAINED]
    wanted = [setting_of(each, seed, timed=timed) for seed in range(seeds) for each in nets]
    missing = [setting for setting in wanted if asdict(setting) not in [r["run"] for r in known]]
    for setting in [] if summary else missing[:most]:
        begin = time.perf_counter()
        found = run(setting)
        record = {"run": asdict(setting), "found": found, "torch": torch.__version__}
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        known.append(record)
        console.print(f"{setting.net}, seed {setting.seed}: {time.perf_counter() - begin:.0f} s")
        console.print({name: f"{one['accuracy']:.2f}" for name, one in found.items()})
    write_page(known, docs)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(setting: Setting) -> dict[str, dict[str, float]]:
    """Accuracy, bytes and processor time beside float, by method."""
    given = trained(setting)
    found: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        base = Path(folder) / "base" / "net.onnx"
        for number, (name, method) in enumerate(METHODS.items()):
            path = base if number == 0 else Path(folder) / str(number) / "net.onnx"
            path.parent.mkdir()
            method(given, path)
            found[name] = {
                "accuracy": round(accuracy(path, *given.test), 3),
                "bytes": path.stat().st_size,
            }
            if setting.timed:
                ratio = time_ratio(path, base, given.test[0])
                found[name]["processor_time"] = round(ratio, 3)
    return found
