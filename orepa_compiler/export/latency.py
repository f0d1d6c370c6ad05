"""How long a collapsed model takes beside the stock one: both in turns, in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orepa_compiler.errors import ExportError, ReparamError
from orepa_compiler.export.counting import Counts, node_count
from orepa_compiler.export.external_data import external_files
from orepa_compiler.export.inspection import load_graph
from orepa_compiler.export.latency_report import Bench, BenchRow, Contents, Timing
from orepa_compiler.export.openvino import OpenVINORunner
from orepa_compiler.export.runners import OnnxRunner, TensorRTRunner
from orepa_compiler.export.signature import TensorSpec

# A round takes each file once, so that what slows the machine down for a while hits both alike.
ROUNDS = 20
# A turn lasts at least this long, so that one switch of a clock or a process does not decide it.
TURN_S = 0.05
WARM_UP = 3
# Of one file alone: what a page of an export has time for.
TIMED_S, MOST_CALLS = 0.5, 200
# Of the interval around the median ratio.
CONFIDENCE = 0.95

BACKENDS = {"onnxruntime CPU": "CPUExecutionProvider", "onnxruntime CUDA": "CUDAExecutionProvider"}


def bench(
    model: Path,
    against: Path,
    *,
    engine: Path | None = None,
    against_engine: Path | None = None,
    batch: int = 1,
    rounds: int = ROUNDS,
    turn_s: float = TURN_S,
    step: Callable[[str], None] = lambda text: None,
) -> Bench:
    """Latencies of two ONNX files, and of their engines, on every backend that is here.

    Random inputs of `batch` samples; a call includes the copy of the inputs and outputs that the
    backend needs. Each round times `model` and `against` in turn; a turn is as many calls as fill
    turn_s. The ratio is the median over the rounds of model's median over against's; its interval
    holds the median with a confidence of 95 %, by order statistics. What cannot run is a row that
    says why. step is told what runs.
    Raises ExportError for a file that cannot be read, for fewer than 6 rounds, and for inputs whose
    shape is open beside the batch.
    """
    if rounds < 6:
        raise ExportError(f"rounds={rounds}: an interval for the median needs 6 rounds or more")
    contents = tuple(contents_of(path) for path in (model, against))
    pairs: dict[str, Callable[[], tuple[Any, Any]]] = {
        name: lambda provider=provider: (  # type: ignore[misc]
            OnnxRunner(model, provider=provider),
            OnnxRunner(against, provider=provider),
        )
        for name, provider in BACKENDS.items()
    }
    pairs["OpenVINO CPU"] = lambda: (OpenVINORunner(model), OpenVINORunner(against))
    pairs["TensorRT"] = lambda: _engines(engine, against_engine)
    rows = []
    for name, make in pairs.items():
        step(name)
        try:
            rows.append(_measured(name, make(), batch, rounds, turn_s))
        except ReparamError as error:
            rows.append(BenchRow(name, reason=str(error)))
    return Bench(contents, tuple(rows), batch, rounds)


def contents_of(path: Path) -> Contents:
    """How many nodes, convs and norms an ONNX file holds, and its size with its weights."""
    model = load_graph(path)
    counts = Counts.of_graph(model)
    files = [path, *(path.resolve().parent / name for name in external_files(model))]
    return Contents(
        str(path),
        nodes=node_count(model),
        convs=counts.convs,
        norms=counts.norms,
        size=sum(file.stat().st_size for file in files if file.is_file()),
    )


def timed(
    run: Callable[..., Any], inputs: Sequence[Any], batch: int, *, seconds: float = TIMED_S
) -> Timing:
    """How long calls of one file take, without another beside it: as many as fill `seconds`."""
    calls = _calls(run, inputs, seconds)
    return Timing.of([_seconds(run, inputs) for _ in range(min(calls, MOST_CALLS))], batch)


def _engines(engine: Path | None, against: Path | None) -> tuple[Any, Any]:
    for path, option in ((engine, "ENGINE"), (against, "--against-engine")):
        if path is None:
            raise ExportError(
                f"no engine was given; give both ENGINE and --against-engine ({option})"
            )
    assert engine is not None
    assert against is not None
    return TensorRTRunner(engine), TensorRTRunner(against)


def _measured(name: str, pair: tuple[Any, Any], batch: int, rounds: int, turn_s: float) -> BenchRow:
    inputs = [example_inputs(runner.inputs, batch) for runner in pair]
    if isinstance(pair[0], TensorRTRunner):
        inputs = [[tensor.cuda() for tensor in tensors] for tensors in inputs]
    calls = [_calls(runner, tensors, turn_s) for runner, tensors in zip(pair, inputs, strict=True)]
    times: tuple[list[float], list[float]] = ([], [])
    ratios = []
    for index in range(rounds):
        medians = [0.0, 0.0]
        # The first of a round has other caches than the second: they take turns in that too.
        for side in (0, 1) if index % 2 == 0 else (1, 0):
            found = [_seconds(pair[side], inputs[side]) for _ in range(calls[side])]
            times[side].extend(found)
            medians[side] = float(np.median(found))
        ratios.append(medians[0] / medians[1])
    low, high = median_interval(ratios)
    ours, theirs = (Timing.of(found, batch) for found in times)
    return BenchRow(name, ours, theirs, float(np.median(ratios)), low, high)


def example_inputs(specs: Sequence[TensorSpec], batch: int) -> list[Tensor]:
    """A random tensor for each input of a file; a symbolic first axis becomes `batch`."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for spec in specs:
        head = [batch if _is_open(axis) else axis for axis in spec.shape[:1]]
        shape = [axis for axis in (*head, *spec.shape[1:]) if isinstance(axis, int) and axis >= 0]
        if len(shape) != len(spec.shape):
            raise ExportError(f"{spec}: its shape is open beside the batch; export a fixed one")
        if spec.dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator).to(spec.dtype))
        else:
            tensors.append(torch.zeros(shape, dtype=spec.dtype))
    return tensors


def _is_open(axis: int | str) -> bool:
    return isinstance(axis, str) or axis < 0


def _calls(runner: Callable[..., Any], inputs: Sequence[Any], turn_s: float) -> int:
    for _ in range(WARM_UP):
        _seconds(runner, inputs)
    return max(1, math.ceil(turn_s / _seconds(runner, inputs)))


def _seconds(runner: Callable[..., Any], inputs: Sequence[Any]) -> float:
    start = time.perf_counter()
    runner(*inputs)
    return time.perf_counter() - start


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval that holds the median of what `values` are drawn from, in 95 % of all cases.

    The k-th smallest and the k-th largest, for the largest k with 2 P(Bin(n, 1/2) < k) <= 0.05.
    """
    ordered, count = sorted(values), len(values)
    below, k = 0.0, 0
    while True:
        below += math.comb(count, k) / 2**count
        if 2 * below > 1 - CONFIDENCE:
            break
        k += 1
    assert k, "fewer than 6 values have no such interval"
    return ordered[k - 1], ordered[-k]
