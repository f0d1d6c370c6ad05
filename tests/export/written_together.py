"""Exports to one path at once, and into a folder that an ordinary user may not write.

python written_together.py FOLDER: prints one JSON line for each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import orepa_compiler as orepa
from orepa_compiler.errors import ReparamError
from orepa_compiler.export import export_onnx
from orepa_compiler.export.onnx import writing as exporting
from tests.export.killed_export import IMAGES, held, net

NOBODY = 65534
WRITERS, ROUNDS = 3, 3


def in_a_child(act: Callable[[], str]) -> tuple[int, int]:
    """A process that does it and writes what it came to: its id, and where to read that."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    try:
        said = act()
    except BaseException as error:  # whatever it is belongs to the test
        said = f"{type(error).__name__}: {error}"
    os.write(write, said.encode())
    os._exit(0)


def result_of(child: int, read: int) -> str:
    with os.fdopen(read) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text


def together(folder: Path) -> None:
    target = folder / "net.onnx"

    def write(seed: int) -> str:
        for _ in range(ROUNDS):
            export_onnx(net(seed), IMAGES, target)
        return "done"

    children = [in_a_child(lambda seed=number % 2: write(seed)) for number in range(WRITERS)]  # type: ignore[misc]
    said = [result_of(*child) for child in children]
    files = sorted(os.listdir(folder))
    print(json.dumps({"said": said, "held": held(target), "files": files}))


def as_an_ordinary_user(folder: Path) -> None:
    model, target = net(0), folder / "net.onnx"
    export_onnx(model, IMAGES, target)
    orepa.save(model, folder / "net.safetensors")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    folder.chmod(0o555)

    def write(act: Callable[[], object]) -> str:
        if os.getuid() == 0:  # whom no mode keeps out
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            act()
        except ReparamError as error:
            return f"{type(error).__name__}: {error}"
        return "written"

    acts = [lambda: export_onnx(model, IMAGES, target),
            lambda: orepa.save(model, folder / "net.safetensors")]  # fmt: skip
    said = [result_of(*in_a_child(lambda act=act: write(act))) for act in acts]  # type: ignore[misc]
    folder.chmod(0o755)
    same = before == {file.name: file.read_bytes() for file in folder.iterdir()}
    print(json.dumps({"said": said, "same": same}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    exporting.EMBED_LIMIT_BYTES = 0  # two files: the graph, and its weights
    root = Path(sys.argv[1])
    for name, act in (("together", together), ("closed", as_an_ordinary_user)):
        (root / name).mkdir()
        act(root / name)
