"""The results as JSON, and as the tables that are printed and that docs/performance.md holds."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.step.variants import VARIANTS
from orepa_compiler.files.atomic import staged

MEGA = 1e6
# Ratios to plain that are aimed at: model, batch, variant -> time.
GOALS = {
    ("resnet18", 32, "orepa"): 1.15,
    ("resnet50", 32, "orepa"): 1.10,
    ("resnet18", 8, "orepa x4"): 1.15,
    ("resnet50", 8, "orepa x4"): 1.10,
}
COLUMNS = (
    "model", "batch", "variant", "s / step", "ratio", "from - to", "goal", "operations",
    "/ plain", "parameters", "saved", "features", "W_e", "other kernels", "peak",
)  # fmt: skip
_MEMORY = ("parameters", "saved", "features", "W_e", "kernels", "peak")

Results = dict[str, Any]


def read(path: Path) -> Results:
    """The results of earlier runs, or none."""
    if not path.exists():
        return {"machine": {}, "cases": {}}
    found: Results = json.loads(path.read_text())
    return found


def write(path: Path, results: Results) -> None:
    """The whole file or, if that fails, the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    found = {"processor": name, "cores": os.cpu_count(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def rows(results: Results) -> Iterator[tuple[str, ...]]:
    """A row of text for each variant of each case; a figure that was not measured is "-"."""
    for case in results["cases"].values():
        setting = case["setting"]
        for name in VARIANTS:
            if name not in case["variants"]:
                continue
            own = case["variants"][name]
            goal = GOALS.get((case["model"], setting["batch"], name))
            is_cpu = setting["device"] == "cpu" and not setting["amp"]
            yield (
                case["model"],
                f"{setting['batch']}{'' if is_cpu else ' ' + setting['device']}",
                name,
                f"{own['seconds']:.3f}",
                f"{own['ratio']:.3f}" if "ratio" in own else "-",
                f"{own['least']:.2f} - {own['most']:.2f}" if "ratio" in own else "-",
                f"{goal:.2f}" if goal and is_cpu else "-",
                *_operations(own, case["variants"].get("plain", {})),
                *(_megabytes(own, key) for key in _MEMORY),
            )


def table(results: Results) -> Table:
    """The table that is printed."""
    made = Table(title="A training step beside the plain model's; memory in MB", box=None)
    for column in COLUMNS:
        made.add_column(column, justify="left" if column in ("model", "variant") else "right")
    for row in rows(results):
        made.add_row(*row)
    return made


def markdown(results: Results) -> str:
    """The table that docs/performance.md holds."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows(results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _operations(own: dict[str, float], plain: dict[str, float]) -> tuple[str, str]:
    """What a step launches, and that over what the plain model's does."""
    if "operations" not in own:
        return "-", "-"
    ratio = own["operations"] / plain["operations"] if "operations" in plain else None
    return f"{own['operations']:.0f}", "-" if ratio is None else f"{ratio:.2f}"


def _megabytes(own: dict[str, float], key: str) -> str:
    return f"{own[key] / MEGA:.0f}" if key in own else "-"
