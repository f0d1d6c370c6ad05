"""Time, memory, and what backward keeps, of the variants of a model."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.step.naive import NaiveConv
from benchmarks.step.variants import VARIANTS, Stepper
from orepa_compiler.generation import generate
from orepa_compiler.generation import store as kernel_store


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    batch: int
    size: int = 224
    device: str = "cpu"
    amp: bool = False
    threads: int = 1


def times(model: str, names: list[str], setting: Setting, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, the variants taking turns; a first round is not counted."""
    steppers = {name: _stepper(name, model, setting) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats + 1):
        for name, stepper in steppers.items():
            seconds = timed(stepper.step, setting.device)
            if number:
                found[name].append(seconds)
    return found


def ratios(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """The median and the spread of each variant's time over its base's, round by round."""
    made = {}
    for name, seconds in found.items():
        base = found.get(VARIANTS[name].base)
        made[name] = {"seconds": statistics.median(seconds)}
        if base:
            by_round = [own / other for own, other in zip(seconds, base, strict=True)]
            made[name] |= {
                "ratio": statistics.median(by_round),
                "least": min(by_round),
                "most": max(by_round),
            }
    return made


def memory(model: str, name: str, setting: Setting) -> dict[str, float]:
    """In a fresh process: the peak of a step, and the bytes of parameters and of saved tensors."""
    task = json.dumps({"model": model, "name": name, **asdict(setting)})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step.measuring", task],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _in_fresh_process(task: dict[str, Any]) -> dict[str, float]:
    model, name = task.pop("model"), task.pop("name")
    setting = Setting(**task)
    stepper = _stepper(name, model, setting)
    stepper.step()
    _forget_peak(setting.device)
    stepper.step()
    peak = _peak(setting.device)
    return {"peak": peak, "parameters": _parameter_bytes(stepper), **saved_bytes(stepper)}


def _forget_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return
    gc.collect()
    with suppress(OSError):  # elsewhere than on Linux the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> float:
    """Bytes: of the device's memory, or of the process's resident memory."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _parameter_bytes(stepper: Stepper) -> int:
    """Parameters, their gradients, and what the optimizer keeps of them."""
    total = 0
    for parameter in stepper.net.parameters():
        state = stepper.optimizer.state[parameter]
        tensors = [parameter, parameter.grad, *state.values()]
        total += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
    return total


def saved_bytes(stepper: Stepper) -> dict[str, int]:
    """What a forward pass keeps for backward beside parameters: features, W_e, other kernels.

    Of a compiled model only the sum is known: in its graph nothing tells one from another.
    """
    saved: dict[int, tuple[str, int]] = {}
    own = {p.untyped_storage().data_ptr() for p in stepper.net.parameters()}
    kernels: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kind = "kernels" if _generating else "features"
            saved.setdefault(place, (kind, tensor.untyped_storage().nbytes()))
        return tensor

    is_compiled = stepper.variant.compiled
    watching = nullcontext() if is_compiled else _watched_generation(kernels)
    with watching, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = stepper.loss()
    total = sum(size for _, size in saved.values())
    del loss
    if is_compiled:
        return {"saved": total}
    sums = {"features": 0, "W_e": 0, "kernels": 0}
    for place, (kind, size) in saved.items():
        sums["W_e" if place in kernels else kind] += size
    return {"saved": total, **sums}


_generating: list[bool] = []


@contextmanager
def _watched_generation(kernels: dict[int, Tensor]) -> Iterator[None]:
    """Notes every W_e, and that what is saved meanwhile is in kernel space."""

    def watched(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(block: Any) -> Any:
            _generating.append(True)
            try:
                made = make(block)
            finally:
                _generating.pop()
            weight = made if isinstance(made, Tensor) else made.weight
            kernels[weight.untyped_storage().data_ptr()] = weight
            return made

        return run

    with (
        patch.object(kernel_store, "generate", watched(generate)),
        patch.object(NaiveConv, "kernel", watched(NaiveConv.kernel)),
    ):
        yield


def _stepper(name: str, model: str, setting: Setting) -> Stepper:
    torch.set_num_threads(setting.threads)
    return Stepper(
        name,
        model,
        batch=setting.batch,
        size=setting.size,
        device=setting.device,
        amp=setting.amp,
    )


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of one step: of the device's own clock where it has one."""
    gc.collect()
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


if __name__ == "__main__":
    print(json.dumps(_in_fresh_process(json.loads(sys.argv[1]))))
