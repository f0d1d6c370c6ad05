"""The rows of the day, in the order in which they are most telling."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_day import equality
from benchmarks.step.measuring import timed
from benchmarks.step.variants import Stepper
from orepa_compiler.errors import ReparamError

# Steps before the clock, and most of those that are timed.
WARM_UPS, STEPS = 3, 20
# Seconds that the timed steps of one row may take.
SECONDS = 10.0

FAST = ("plain", "orepa", "orepa, hooks", "two-phase", "two-phase, graphs", "dbb", "naive")
COMPILED = (
    "plain compiled", "orepa compiled", "two-phase, compiled kernels", "two-phase, reduce-overhead"
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How large the day is. On a CPU it is a rehearsal: the same rows, as small as they go."""

    models: tuple[str, ...] = ("resnet18", "resnet50")
    batches: tuple[int, ...] = (64, 256)
    size: int = 224
    compiled: tuple[str, ...] = COMPILED


REHEARSAL = Scale(models=("test_resnet",), batches=(2,), size=32, compiled=())


@dataclass(frozen=True)
class Row:
    """One line. state: done, failed or not run, and why. figures: what was found."""

    name: str
    state: str = "not run"
    figures: dict[str, float | str] = field(default_factory=dict)
    reason: str = "not reached"
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


Work = Callable[[], "dict[str, float | str]"]


def rows(device: str, scale: Scale) -> Iterator[tuple[str, Work]]:
    """Each row's name and what makes its figures."""
    first = scale.models[0]
    for precision in equality.PRECISIONS:
        for way in ("alone", "together", "graphs"):
            name = f"kernels, {precision.name}, {way}"
            yield name, partial(equality.kernels, first, device, precision, way)
    for kind, check in equality.CHECKS.items():
        for precision in equality.PRECISIONS:
            if kind == "step" or not (precision.bf16 or precision.tf32):
                name = f"{kind}, {precision.name}"
                yield name, partial(check, first, device, precision, min(scale.size, 64))
    for variants in (FAST, scale.compiled):
        for model in scale.models:
            for batch in scale.batches:
                for variant in variants:
                    name = step_name(model, batch, variant)
                    yield name, partial(cost, model, variant, device, batch, scale.size)
    for of_engine in ("fp32", "fp16"):
        yield f"engine, resnet18, {of_engine}", partial(engine, of_engine, device)


def step_name(model: str, batch: int, variant: str) -> str:
    return f"step, {model}, batch {batch}, {variant}"


def cost(model: str, variant: str, device: str, batch: int, size: int) -> dict[str, float | str]:
    """Milliseconds of a step in bf16, the median, and the largest memory of one."""
    torch._dynamo.reset()
    stepper = Stepper(variant, model, batch=batch, size=size, device=device, amp=True)
    for _ in range(WARM_UPS):
        stepper.step()
    has_memory = device != "cpu"
    if has_memory:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while len(seconds) < STEPS and sum(seconds) < SECONDS:
        seconds.append(timed(stepper.step, device))
    found: dict[str, float | str] = {"ms": 1e3 * statistics.median(seconds)}
    if has_memory:
        found["MB"] = torch.cuda.max_memory_allocated() / 1e6
    return found


def engine(precision: str, device: str) -> dict[str, float | str]:
    """The collapsed ResNet-18 beside the stock one, by what engines there are."""
    from benchmarks.gpu.measuring import measure, why_not_here

    if device == "cpu" or (reason := why_not_here()):
        raise ReparamError("engines are for a GPU" if device == "cpu" else reason)
    row = measure("resnet18", "torchvision:resnet18", precision, batch=1)
    if row.state != "done":
        raise ReparamError(row.reason)
    checks = {name: check.verdict for name, check in row.checks.items()}
    ratios = {f"{r['backend']} ratio": r["ratio"] for r in row.bench["rows"] if r.get("ratio")}
    return {**checks, **ratios}


def run(name: str, work: Work) -> Row:
    """The row; an error is one row's, the others go on."""
    start = time.perf_counter()
    try:
        figures = work()
        row = Row(name, "done", figures, "", time.perf_counter() - start)
    except (ReparamError, ImportError) as error:
        row = Row(name, "not run", {}, str(error), time.perf_counter() - start)
    except Exception as error:  # out of memory, a compiler that fails
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        row = Row(name, "failed", {}, reason, time.perf_counter() - start)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row
