"""python -m benchmarks.compile_time: what plan, expand and collapse take, in seconds and memory."""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import orepa_compiler as orepa
from benchmarks.step.results import machine
from orepa_compiler.files.atomic import staged
from orepa_compiler.model_source import declare_torchvision_operators

OUTPUT = Path(__file__).parent / "results/compile_time.json"
DEPTHS = (25, 50, 100, 200, 400)
LARGEST = ("regnety_2560", "convnext_xxlarge")
IN_PLACE = "wide_resnet101_2"


class Residual(nn.Module):
    """Two 3 x 3 convs and their norms: one link of a chain of any length."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm, self.last = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inside = self.relu(self.norm(self.first(x)))
        return self.relu(x + self.last(self.second(inside)))


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    made = work()
    return time.perf_counter() - begin, made


def of_model(name: str, net: nn.Module, *, collapses: bool) -> dict[str, Any]:
    """The row of a model, each step once."""
    convs = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    planned, _ = seconds(lambda: orepa.plan(net))
    init: Any = "preserve" if collapses else "paper"  # on meta there are no kernels to preserve
    expanded, made = seconds(lambda: orepa.expand(net, init=init))
    row = {"model": name, "convs": convs, "plan": planned, "expand": expanded}
    if collapses:
        row["collapse"], _ = seconds(lambda: orepa.collapse(made))
    return row


def peak_in_place(queue: Any) -> None:
    """How far the memory of a fresh process rises, in sizes of the expanded model."""
    declare_torchvision_operators()
    import torchvision

    orepa.expand(nn.Sequential(Residual()))  # what is loaded once
    before = psutil.Process().memory_info().rss / 1024
    net = torchvision.models.get_model(IN_PLACE)
    net = orepa.expand(net, inplace=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    queue.put({"model": IN_PLACE, "expanded_mb": size / 2**20, "peak_mb": peak / 1024})


def measure() -> dict[str, Any]:
    declare_torchvision_operators()
    import timm
    import torchvision

    torch.set_num_threads(1)
    orepa.plan(nn.Sequential(Residual()))
    rows = [of_model("resnet50", torchvision.models.resnet50(), collapses=True)]
    for name in LARGEST:
        with torch.device("meta"):
            net = timm.create_model(name)
        rows.append(of_model(f"{name}, on meta", net, collapses=False))
    for depth in DEPTHS:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), *(Residual() for _ in range(depth)))
        rows.append(of_model(f"{depth} residual blocks", net, collapses=True))
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=peak_in_place, args=(queue,))
    process.start()
    in_place = queue.get()
    process.join()
    return {"machine": machine(), "rows": rows, "in_place": in_place}


def table(found: dict[str, Any]) -> Table:
    made = Table(title="Seconds, one thread", box=None, title_justify="left")
    for column in ("model", "convs", "plan", "expand", "collapse", "ms a conv"):
        made.add_column(column, justify="left" if column == "model" else "right")
    for row in found["rows"]:
        times = [row.get(step) for step in ("plan", "expand", "collapse")]
        each = [f"{1000 * t / row['convs']:.0f}" for t in times if t is not None]
        cells = ["-" if t is None else f"{t:.2f}" for t in times]
        made.add_row(row["model"], str(row["convs"]), *cells, " / ".join(each))
    return made


if __name__ == "__main__":
    console = Console()
    with console.status("two minutes"):
        result = measure()
    with staged(OUTPUT) as draft:
        draft.write_text(json.dumps(result, indent=1) + "\n")
    console.print(table(result))
    memory = result["in_place"]
    ratio = memory["peak_mb"] / memory["expanded_mb"]
    console.print(f"expand({memory['model']}, inplace=True): peak {ratio:.2f} x the expanded model")
