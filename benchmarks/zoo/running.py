"""Going over many models: each in a process of its own, with a limit on its time and memory.

The processes are forked from this one, which has imported everything, so a model costs no import.
A process that dies gives a row all the same.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo.building import Subject
from benchmarks.zoo.examining import Limits, Row

Examine = Callable[[Subject, Limits], Row]

_POLL = 0.05  # seconds between two looks at the processes
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LOG = 1500  # characters of what a crashed process wrote
_fork = multiprocessing.get_context("fork")


@dataclass
class _Job:
    subject: Subject
    process: BaseProcess
    answer: Connection
    log: Path
    start: float
    peak: float = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def run_all(
    subjects: Sequence[Subject],
    examine: Examine,
    limits: Limits,
    *,
    jobs: int = 2,
    idle: Callable[[Sequence[str]], None] = lambda running: None,
) -> Iterator[Row]:
    """The row of each subject, as they come. idle is called with what is running, often.

    Closing the iterator ends the processes that still run.
    """
    waiting = list(reversed(subjects))
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_started(waiting.pop(), examine, limits))
            time.sleep(_POLL)
            idle([job.subject.key for job in running])
            for job in list(running):
                if (row := _looked_at(job, limits)) is not None:
                    running.remove(job)
                    yield row
    finally:
        for job in running:
            _ended(job)


def _started(subject: Subject, examine: Examine, limits: Limits) -> _Job:
    receiver, sender = _fork.Pipe(duplex=False)
    log = Path(tempfile.mkstemp(prefix="zoo-", suffix=".log")[1])
    process = _fork.Process(target=_work, args=(subject, examine, limits, sender, log))
    with warnings.catch_warnings():  # of a fork beside torch's threads, which wait and hold no lock
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    return _Job(subject, process, receiver, log, time.perf_counter())


def _work(
    subject: Subject, examine: Examine, limits: Limits, sender: Connection, log: Path
) -> None:
    """In the new process: one model, whatever it prints going to the log."""
    target = os.open(log, os.O_WRONLY | os.O_TRUNC)
    os.dup2(target, sys.stdout.fileno() if _has_descriptor(sys.stdout) else 1)
    os.dup2(target, 2)
    faulthandler.enable(file=2)  # a crash in compiled code says where
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        row = examine(subject, limits)
    except BaseException:
        row = {**_identity(subject), "status": "crash", "why": traceback.format_exc()[-1500:]}
    sender.send(row)
    sender.close()
    os._exit(0)  # without the parent's exit handlers


def _has_descriptor(stream: Any) -> bool:
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False


def _looked_at(job: _Job, limits: Limits) -> Row | None:
    """The row of a process that answered, died, or went over a limit; None while it works."""
    job.peak = max(job.peak, _memory(job.process.pid))
    row: Row | None = None
    if job.answer.poll():
        row = _received(job)
    elif not job.process.is_alive():
        row = _crashed(job)
    elif job.seconds > limits.seconds:
        why = f"it ran longer than {limits.seconds:g} s"
        row = {**_identity(job.subject), "status": "time", "why": why}
    elif job.peak > limits.memory:
        why = f"it took more than {limits.memory / 1e9:g} GB"
        row = {**_identity(job.subject), "status": "memory", "why": why}
    if row is None:
        return None
    row["peak_gb"] = round(job.peak / 1e9, 2)
    row.setdefault("total_s", round(job.seconds, 2))
    _ended(job)
    return row


def _received(job: _Job) -> Row:
    try:
        row: Row = job.answer.recv()
        return row
    except EOFError:  # it died before it could answer
        return _crashed(job)


def _crashed(job: _Job) -> Row:
    job.process.join()
    code = job.process.exitcode
    last = job.log.read_text(errors="replace").strip()[-_LOG:]
    why = f"the process ended with code {code} and no answer; {last or 'it wrote nothing'}"
    return {**_identity(job.subject), "status": "crash", "why": why}


def _ended(job: _Job) -> None:
    if job.process.is_alive():
        job.process.kill()
    job.process.join()
    job.answer.close()
    job.log.unlink(missing_ok=True)


def _identity(subject: Subject) -> Row:
    return {"library": subject.library, "name": subject.name, "family": subject.family}


def _memory(pid: int | None) -> float:
    """Bytes that a process holds, those it shares with this one included."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):  # it has just ended
        return 0.0
