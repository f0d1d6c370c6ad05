"""The rows on disk: one JSON file, written whole, that a later run continues."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import orepa_compiler
from benchmarks.zoo.examining import Row

_EVERY = 5.0  # seconds between two writes

# Rooms and files of the library that no check of the zoo or of the field runs.
_UNUSED = frozenset(
    (
        *("cli", "export", "report", "reference", "checkpoints", "model_source", "testing"),
        *("proving", "int8", "branch_history", "parameter_groups", "optimizer_mapping"),
        *("stepping", "reduction"),
    )
)

FAILED = frozenset({"fail", "error", "crash", "time", "memory"})
REDO = ("none", "failed", "reduced", "old", "all")


class Results:
    """Rows by model. add keeps one; save writes all of them, and add does so now and then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self.environment: dict[str, Any] = {}
        self._written = 0.0
        if path.exists():
            known = json.loads(path.read_text())
            self.rows = {key_of(row): row for row in known["rows"]}
            self.environment = known["environment"]

    def add(self, row: Row) -> None:
        self.rows[key_of(row)] = row
        if time.monotonic() - self._written > _EVERY:
            self.save()

    def save(self) -> None:
        """One row a line, in the order of their names; the file is replaced in one step."""
        rows = ",\n".join(json.dumps(self.rows[key]) for key in sorted(self.rows))
        text = f'{{"environment": {json.dumps(self.environment)},\n"rows": [\n{rows}\n]}}\n'
        write_whole(self.path, text)
        self._written = time.monotonic()

    def urgency(self, key: str) -> int:
        """0 for a model without a row, or with one that failed; 1 for a reduced one; 2 for others.

        What an interrupted run leaves out is what is known best.
        """
        redone = ("failed", "reduced")
        return next((n for n, redo in enumerate(redone) if self.is_due(key, redo, "")), len(redone))

    def is_due(self, key: str, redo: str, source: str) -> bool:
        """Whether a model is to be run: it has no row, or one that `redo` names."""
        row = self.rows.get(key)
        if row is None or redo == "all":
            return True
        if redo == "failed":
            return row["status"] in FAILED or row["status"] == "not compared"
        if redo == "reduced":
            return "reduced_for" in row
        return redo == "old" and row.get("source") != source


def key_of(row: Row) -> str:
    return f"{row['library']}:{row['name']}"


def write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def source_version() -> str:
    """A short hash of the source that the checks run, to tell rows of different versions."""
    digest = hashlib.sha256()
    folder = Path(orepa_compiler.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        if _UNUSED.isdisjoint(file.relative_to(folder).with_suffix("").parts):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


def environment(command: str) -> dict[str, Any]:
    """The machine, the versions, the command and the day."""
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gb()} GB",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
        "orepa-compiler": orepa_compiler.__version__,
        "revision": _revision(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _memory_gb() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)


def _revision() -> str:
    folder = Path(__file__).parent
    repository = folder.parent.parent

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=repository, capture_output=True, text=True)
        return found.stdout.strip()

    changed = git("status", "--porcelain", "--", "orepa_compiler", "benchmarks/zoo")
    revision = git("describe", "--always") or "unknown"
    return f"{revision}-dirty" if changed else revision
