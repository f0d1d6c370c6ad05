"""docs/gpu.md: what the rows say, as one page of markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.measuring import CUDA, TENSORRT, Row

_INTRODUCTION = """\
# On a GPU

Only a machine with a GPU can tell whether a TensorRT engine gives the model's outputs, and how long
it takes. A cell says *not run* until it has been measured; *not run* is not a pass.

**{done} of {all} rows were run.**

On a machine with a GPU:

    pip install -e '.[gpu,trt,models]'     # or trt-rtx instead of trt, see below
    python -m benchmarks.gpu

For each model and precision this expands the stock net (random weights, norm statistics as training
leaves them), collapses it, exports both nets to ONNX, builds both engines, compares the outputs of
the collapsed net's engine with the net in float64, and times both engines in turn. It writes
`benchmarks/results/gpu.json` and this page after every row. If interrupted, it continues where it
stopped; `--redo` starts again, for instance after you installed a missing package. For a model of
your own:

    orepa-export nets.py:trained --onnx net.onnx --trt net.engine --precision fp16
    orepa verify net.onnx net.engine --precision fp16
    orepa bench net.onnx net.engine --against stock.onnx --against-engine stock.engine --gate

- **H100, H200, B200** need classic TensorRT (extra `trt`): TensorRT for RTX builds engines for
  compute capabilities 7.5, 8.0, 8.6, 8.9, 12.0 and 12.1, not for 9.0 and 10.0. If you cannot
  install classic TensorRT, onnxruntime's CUDA provider (extra `gpu`) still compares and times the
  ONNX file; the cells of the engine then say why there is none.
- Engines are built for the GPU of the machine, with TF32 off.
"""
_AGREEMENT = """\
## Outputs

The largest error divided by the largest output, and the verdict. A row passes if the error is at
most 4 times the [noise](words.md) of the model's own precision (in int8: of rounding to its steps),
on inputs from a normal distribution and, except in int8, on random, constant, large and small ones.
"""
_LATENCY = """\
## Latency

Median milliseconds, collapsed / stock, measured in turn; then the ratio with its 95 % interval.
Both files must have the same number of nodes, and the collapsed net must be as fast as the stock
net within noise, or faster.
"""
_AGREEMENT_TITLES = ("model", "precision", CUDA, "TensorRT engine")
_LATENCY_TITLES = ("model", "precision", "nodes", CUDA, TENSORRT)


def page(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """The page for these rows. facts: of the machine."""
    done = sum(row.state == "done" for row in rows)
    agreement = [(*_name(row), *(_agreement(row, b) for b in (CUDA, TENSORRT))) for row in rows]
    latency = [
        (*_name(row), _nodes(row), *(_latency(row, b) for b in (CUDA, TENSORRT))) for row in rows
    ]
    reasons = "\n".join(f"- {reason}" for reason in _reasons(rows))
    parts = [
        _INTRODUCTION.format(done=done, all=len(rows)),
        f"{_AGREEMENT}\n{_table(_AGREEMENT_TITLES, agreement)}",
        f"{_LATENCY}\n{_table(_LATENCY_TITLES, latency)}",
        f"## Why a cell has no figure\n\n{reasons or 'Every cell has one.'}\n",
        f"## How it was run\n\n{_table(('', ''), [(n, str(v)) for n, v in facts.items()])}",
    ]
    return "\n".join(parts)


def _name(row: Row) -> tuple[str, str]:
    return row.model, row.precision


def _agreement(row: Row, backend: str) -> str:
    check = row.checks.get(backend)
    if check is None:
        return row.state
    if check.error is None or check.tolerance is None:
        return check.verdict
    return f"{check.verdict} {check.error:.1e} (tolerance {check.tolerance:.1e})"


def _nodes(row: Row) -> str:
    files = row.bench.get("files")
    return " / ".join(f"{file['nodes']:,}" for file in files) if files else row.state


def _latency(row: Row, backend: str) -> str:
    found = next((r for r in row.bench.get("rows", ()) if r["backend"] == backend), None)
    if found is None or found["ratio"] is None:
        return "not run" if row.state == "done" else row.state
    ours, theirs = found["model"]["median_ms"], found["against"]["median_ms"]
    interval = f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
    return f"{ours:.3f} / {theirs:.3f}; {interval}: {found['verdict']}"


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Each reason once, with the rows that it is of."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for reason in _reasons_of(row):
            found.setdefault(" ".join(reason.split()), []).append(f"{row.model} {row.precision}")
    return [
        f"{'every row' if len(names) == len(rows) else ', '.join(names)}: {reason}"
        for reason, names in found.items()
    ]


def _reasons_of(row: Row) -> Iterator[str]:
    if row.reason:
        yield f"{row.state}: {row.reason}"
    for backend, check in row.checks.items():
        if check.reason:
            yield f"{backend}: {check.verdict}: {check.reason}"


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"
