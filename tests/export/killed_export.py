"""Exports one of two nets over the other, again and again, and is killed at a random moment.

python killed_export.py FOLDER: prints one JSON line for each kill: what the folder then held.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from orepa_compiler.export import OnnxRunner, export_onnx
from orepa_compiler.export.onnx import writing as exporting
from orepa_compiler.export.onnx.program import trace_program
from orepa_compiler.files import atomic

KILLS = 20
PAUSE_S = 0.02
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    width = 8 + seed  # so that the graph of one does not fit the weights of the other
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 1)).eval()


def slowed_export(seed: int, target: Path, reached: int) -> None:
    """The export, with a pause at each rename, so that a kill can come between two of them.

    reached: where a byte is written when the files are about to be moved into place.
    """
    publish, replace = atomic._publish, os.replace

    def announced_publish(folder: Path, target: Path) -> None:
        os.write(reached, b"p")
        publish(folder, target)

    def slow_replace(source: Path, target: Path) -> None:
        time.sleep(PAUSE_S)
        replace(source, target)
        time.sleep(PAUSE_S)

    atomic._publish, os.replace = announced_publish, slow_replace  # type: ignore[assignment]
    export_onnx(net(seed), IMAGES, target)


def pair_of(seed: int, target: Path) -> Path:
    """Where the right files of a net lie."""
    return target.parent / f"right-{seed}"


def copy_pair(seed: int, draft: Path) -> None:
    for file in pair_of(seed, draft.parent).iterdir():
        shutil.copy(file, draft.parent)


def killed_once(number: int, target: Path, seconds: float, programs: dict[int, Any]) -> bool:
    """Whether the export was done before it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if number % 4:  # what comes before the files is the same each time
                exporting.trace_program = lambda *args, **options: programs[number % 2]
                exporting._write = lambda program, draft, *args: copy_pair(number % 2, draft)
            slowed_export(number % 2, target, write)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    if number % 4:  # most of them while the files are moved
        os.read(read, 1)
        time.sleep(random.uniform(0, 5 * PAUSE_S))
    else:
        time.sleep(random.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    os.close(read)
    return os.waitpid(child, 0)[1] == 0


def held(target: Path) -> int | str:
    """Which of the two nets the file is, or what is wrong with it."""
    try:
        onnx.checker.check_model(str(target), full_check=True)
        found = OnnxRunner(target)(IMAGES)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for seed in (0, 1):
        with torch.no_grad():
            if np.allclose(net(seed)(IMAGES), found, atol=1e-5):
                return seed
    return "neither net"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    random.seed(0)
    exporting.EMBED_LIMIT_BYTES = 0  # two files: the graph, and its weights
    target = folder / "net.onnx"
    export_onnx(net(1), IMAGES, target)
    start = time.perf_counter()
    export_onnx(net(1), IMAGES, target)
    seconds, before = time.perf_counter() - start, held(target)
    programs = {seed: trace_program(net(seed), (IMAGES,), dynamic_batch=True) for seed in (0, 1)}
    for seed in (0, 1):
        pair_of(seed, target).mkdir()
        export_onnx(net(seed), IMAGES, pair_of(seed, target) / target.name)
    for number in range(KILLS):
        done = killed_once(number, target, seconds, programs)
        after = held(target)
        files = sorted(file.name for file in folder.glob("net*"))
        line = {"old": before, "new": number % 2, "held": after, "done": done, "files": files}
        print(json.dumps(line), flush=True)
        before = after


if __name__ == "__main__":
    main(Path(sys.argv[1]))
