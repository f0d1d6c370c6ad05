"""Groups of gloo processes for tests: they end, whatever happens in one of them."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# A process that waits for one that died gives up after this time.
PEER_TIMEOUT = timedelta(seconds=20)

# One server imports everything once, and each process is a fork of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "orepa_compiler", "torch.distributed.fsdp"])


@dataclass(frozen=True)
class Died:
    """What is known of a process that gave no result."""

    exit_code: int | None


class ProcessError(AssertionError):
    """A process of a group raised: its rank and its traceback."""


def run_group(
    function: Callable[..., Any], count: int, *arguments: Any, timeout: float = 600.0
) -> list[Any]:
    """What function(rank, *arguments) gives in each of `count` processes, in order of rank.

    They meet through a file, so no port is taken. One that dies counts as Died, and the others are
    then killed, as torchrun does. Nothing is left running.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(count)]
        processes = [
            _CONTEXT.Process(
                target=_member,
                args=(sender, function, rank, count, f"file://{folder}/meet", arguments),
                daemon=True,
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()  # the child's own end is then the last, and its death ends the pipe
            return _results(processes, [receiver for receiver, _ in pipes], timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _results(processes: list[Any], receivers: list[Connection], timeout: float) -> list[Any]:
    deadline, results = time.monotonic() + timeout, dict[int, Any]()
    while len(results) < len(receivers):
        waiting = {r: rank for rank, r in enumerate(receivers) if rank not in results}
        left = max(0.0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait(list(waiting), left)
        if not ready:
            raise ProcessError(f"ranks {sorted(waiting.values())} gave nothing in {timeout} s")
        for receiver in ready:
            rank = waiting[receiver]  # type: ignore[index]
            try:
                error, results[rank] = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(10)
                results[rank] = Died(processes[rank].exitcode)
                return [results.get(r, Died(None)) for r in range(len(receivers))]
            if error:
                raise ProcessError(f"rank {rank}:\n{error}")
    return [results[rank] for rank in range(len(receivers))]


def _member(
    sender: Connection,
    function: Callable[..., Any],
    rank: int,
    count: int,
    address: str,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    error, result = "", None
    try:
        dist.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=count, timeout=PEER_TIMEOUT
        )
        result = function(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # whatever it is, the test that waits for this process must see it
        error = traceback.format_exc()
    sender.send_bytes(pickle.dumps((error, result)))
    sender.close()
