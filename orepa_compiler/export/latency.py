"""Times a collapsed model beside the stock one: both in turns, in one run."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from orepa_compiler.errors import ExportError, ReparamError
from orepa_compiler.export.gates.counting import Counts, node_count
from orepa_compiler.export.onnx.external_data import external_files
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.export.run.openvino import OpenVINORunner
from orepa_compiler.export.run.runners import OnnxRunner, TensorRTRunner
from orepa_compiler.export.run.signature import TensorSpec

WIDTH = 120  # of the text that str() gives


@dataclass(frozen=True)
class Contents:
    """What an ONNX file holds. size: in bytes, with its weights."""

    path: str
    nodes: int
    convs: int
    norms: int
    size: int


@dataclass(frozen=True)
class Timing:
    """Of all calls: the median and the 95th percentile in ms; samples per second at the median."""

    median_ms: float
    p95_ms: float
    throughput: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float], batch: int) -> Timing:
        """Sums up the timing of calls on `batch` samples each."""
        median, p95 = np.percentile(seconds, [50, 95])
        return cls(1e3 * float(median), 1e3 * float(p95), batch / float(median), len(seconds))

    def __str__(self) -> str:
        return (
            f"median {self.median_ms:.3f} ms, 95th percentile {self.p95_ms:.3f} ms "
            f"({self.calls} calls, {self.throughput:,.1f} samples/s)"
        )


@dataclass(frozen=True)
class BenchRow:
    """One backend: model beside against, or the reason why it was not run.

    ratio: model's time over against's, the median over the rounds; low, high: its interval.
    """

    backend: str
    model: Timing | None = None
    against: Timing | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """Says in words what the ratio tells."""
        if self.ratio is None or self.low is None or self.high is None:
            return f"not run: {self.reason}"
        if self.low <= 1 <= self.high:
            return "within noise"
        return "faster" if self.high < 1 else "slower"


@dataclass(frozen=True, repr=False)
class Bench:
    """Truthy when at least one backend ran. files: model, then against."""

    files: tuple[Contents, ...]
    rows: tuple[BenchRow, ...]
    batch: int
    rounds: int

    def __bool__(self) -> bool:
        return any(row.ratio is not None for row in self.rows)

    @property
    def problems(self) -> tuple[str, ...]:
        """Lists what keeps model from being as fast as against: node counts, a slower backend.

        Two files of the same architecture have the same number of nodes.
        """
        found = [f"{row.backend}: slower" for row in self.rows if row.verdict == "slower"]
        counts = [file.nodes for file in self.files]
        if len(set(counts)) > 1:
            texts = " and ".join(f"{count:,}" for count in counts)
            found.insert(0, f"the files have {texts} nodes: not the same architecture")
        return tuple(found)

    def __repr__(self) -> str:
        return f"<Bench {'; '.join(f'{row.backend}: {row.verdict}' for row in self.rows)}>"

    def __str__(self) -> str:
        page = io.StringIO()
        Console(file=page, width=WIDTH, force_terminal=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())

    def __rich__(self) -> Group:
        contents = _table("file", "nodes", "convs", "norms", "bytes")
        for file in self.files:
            counts = (file.nodes, file.convs, file.norms, file.size)
            contents.add_row(Text(file.path), *(f"{count:,}" for count in counts))
        timings = _table("backend", "file", "median ms", "p95 ms", "samples/s", "ratio", "")
        for row in self.rows:
            if row.model is None or row.against is None:
                timings.add_row(row.backend, "", "", "", "", "", Text(row.verdict))
                continue
            ratio = f"{row.ratio:.3f} ({row.low:.3f} to {row.high:.3f})"
            timings.add_row(row.backend, "model", *_numbers(row.model), ratio, row.verdict)
            timings.add_row("", "against", *_numbers(row.against), "", "")
        note = (
            f"batch {self.batch}; {self.rounds} rounds, each file in turn; ratio: model's time over"
            " against's, the median over the rounds and its 95 % interval; within noise: 1 is in it"
        )
        problems = [Text(problem) for problem in self.problems]
        return Group(contents, Text(""), timings, Text(note), *problems)

    def to_dict(self) -> dict[str, Any]:
        """Gives all of it as plain values that json.dumps takes."""
        return {
            "files": [asdict(file) for file in self.files],
            "rows": [{**asdict(row), "verdict": row.verdict} for row in self.rows],
            "batch": self.batch,
            "rounds": self.rounds,
            "problems": list(self.problems),
        }


def _numbers(timing: Timing) -> tuple[str, str, str]:
    return f"{timing.median_ms:.3f}", f"{timing.p95_ms:.3f}", f"{timing.throughput:,.1f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        justify: Literal["left", "right"] = "left" if name in ("file", "backend", "") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    return table


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
    contents = tuple(file_contents(path) for path in (model, against))
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


def file_contents(path: Path) -> Contents:
    """Counts the nodes, convs and norms of an ONNX file, and its size with its weights."""
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
    """Times calls of one file, without another beside it: as many as fill `seconds`."""
    calls = _calls(run, inputs, seconds)
    return Timing.of([_seconds(run, inputs) for _ in range(min(calls, MOST_CALLS))], batch)


def _engines(engine: Path | None, against: Path | None) -> tuple[Any, Any]:
    if engine is None and against is None:
        raise ExportError(
            "no engine was given; to time TensorRT too, give ENGINE and --against-engine"
        )
    for path, option in ((engine, "ENGINE"), (against, "--against-engine")):
        if path is None:
            raise ExportError(f"{option} is missing; give the engines of both files, or of none")
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
    """Makes a random tensor for each input of a file; a symbolic first axis becomes `batch`."""
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
    """Computes the interval that holds the median behind `values` in 95 % of all cases.

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
