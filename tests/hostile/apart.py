"""Judges forms in processes of their own: one that kills its process is a fault, not the end."""

from __future__ import annotations

import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys

from tests.hostile.forms import Form, Pair
from tests.hostile.judging import faults

SECONDS = 60


@functools.cache
def faults_apart(module: str, *, thorough: bool = False) -> dict[str, list[str]]:
    """The faults of each form of a test module, each judged in a fork of one new process."""
    command = [sys.executable, "-m", "tests.hostile.apart", module, *["thorough"] * thorough]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _in_a_fork(module: str, name: str, number: int | None) -> list[str]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = faults(importlib.import_module(module).FORMS[name], number=number)
        except Exception as crash:  # the parent tells it
            found = [f"CRASH before any verb: {crash!r}"]
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    written = _read(reader, child)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return [f"KILLED by {signal.Signals(os.WTERMSIG(status)).name}"]
    return list(json.loads(written)) if written else ["CRASH of the process"]


def _read(reader: int, child: int) -> str:
    """What the child writes; it is ended where it takes too long."""
    written = b""
    while select.select([reader], [], [], SECONDS)[0]:
        part = os.read(reader, 65536)
        if not part:
            return written.decode()
        written += part
    os.kill(child, signal.SIGKILL)
    return ""


if __name__ == "__main__":
    faults(Form(Pair))  # what is imported late is imported once
    path, is_thorough = sys.argv[1], bool(sys.argv[2:])
    names = list(importlib.import_module(path).FORMS)
    numbers = [None if is_thorough else number for number in range(len(names))]
    judged = {n: _in_a_fork(path, n, at) for n, at in zip(names, numbers, strict=True)}
    print(json.dumps(judged))
