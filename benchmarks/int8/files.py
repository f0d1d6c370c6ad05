"""What an ONNX file gives in onnxruntime on this CPU: accuracy as it is written, and latency."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import onnxruntime
from torch import Tensor

BATCH = 500
TIMED, ROUNDS = 32, 21


def session(path: Path, *, as_written: bool) -> Any:
    """A session on one thread; as written: no operator is exchanged for an int8 kernel.

    x86 without VNNI adds products of uint8 and int8 in 16 bits, which is not what the file says.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def accuracy(path: Path, images: Tensor, classes: Tensor) -> float:
    """In per cent."""
    running = session(path, as_written=True)
    name = running.get_inputs()[0].name
    right = 0
    for batch, labels in zip(images.split(BATCH), classes.split(BATCH), strict=True):
        (scores,) = running.run(None, {name: batch.numpy()})
        right += int((scores.argmax(1) == labels.numpy()).sum())
    return 100 * right / len(images)


def time_ratio(path: Path, base: Path, images: Tensor) -> float:
    """The median over the rounds of this file's processor time over the other's, in turn.

    Of the processor, on one thread: what else runs on the machine counts little.
    """
    feeds = []
    for each in (path, base):
        running = session(each, as_written=False)
        feeds.append((running, {running.get_inputs()[0].name: images[:TIMED].numpy()}))
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for running, feed in feeds:
            begin = time.process_time()
            running.run(None, feed)
            times.append(time.process_time() - begin)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)
