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
from itertools import count
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
MOMENTS = 5  # in the move of two files: see stopped_export
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    width = 8 + seed  # so that the graph of one does not fit the weights of the other
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 1)).eval()


def stopped_export(seed: int, target: Path, reached: int, moment: int) -> None:
    """The export, standing still at one moment of the move into place, where it is killed.

    The moments are before anything is moved, and before and after each of the two renames. reached:
    where a byte is written at each of them.
    """
    publish, replace, passed = atomic._publish, os.replace, count()

    def pass_moment() -> None:
        os.write(reached, b"m")
        if next(passed) == moment:
            signal.pause()

    def announced_publish(folder: Path, target: Path) -> None:
        pass_moment()
        publish(folder, target)

    def announced_replace(source: Path, target: Path) -> None:
        pass_moment()
        replace(source, target)
        pass_moment()

    atomic._publish, os.replace = announced_publish, announced_replace  # type: ignore[assignment]
    export_onnx(net(seed), IMAGES, target)


def pair_of(seed: int, target: Path) -> Path:
    """Where the right files of a net lie."""
    return target.parent / f"right-{seed}"


def copy_pair(seed: int, draft: Path) -> None:
    for file in pair_of(seed, draft.parent).iterdir():
        shutil.copy(file, draft.parent)


def killed_once(number: int, target: Path, seconds: float, programs: dict[int, Any]) -> bool:
    """Whether the export was done before it was killed."""
    # One in four is killed at any time, the others at each moment of the move in turn.
    moment = number % MOMENTS if number % 4 else None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            if moment is not None:  # what comes before the files is the same each time
                exporting.trace_program = lambda *args, **options: programs[number % 2]
                exporting._write = lambda program, draft, *args: copy_pair(number % 2, draft)
            stopped_export(number % 2, target, write, -1 if moment is None else moment)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    if moment is None:
        time.sleep(random.uniform(0, seconds))
    else:
        for _ in range(moment + 1):
            os.read(read, 1)
    os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1] == 0
    os.close(read)
    return ended


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
