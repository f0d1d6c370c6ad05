"""Calibration data for int8 from the command line: files, or a function that gives batches."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from orepa_compiler.cli.inputs import load_inputs
from orepa_compiler.errors import ReparamError
from orepa_compiler.model_source import call_source

# Samples in one call while the ranges are taken.
BATCH = 8


def load_calibration(source: str, batch: int) -> list[tuple[Tensor, ...]]:
    """The batches that `source` names; those from files are of at most `batch` samples.

    source: a folder of .npy or .npz files, or one such file, as for --inputs; or a function,
    `package.module:function` or `path/to/file.py:function`, that needs no arguments and gives a
    tensor, a tuple of positional arguments, or a list or generator of such batches.

    Raises ReparamError for a source that is not there, and where it gives no batches.
    """
    path = Path(source)
    if path.exists() or ":" not in source:
        return load_inputs(path, batch, option="--calibration")
    given = call_source(source)
    batches = list(given) if isinstance(given, list) else [given]
    found = [entry if isinstance(entry, tuple) else (entry,) for entry in batches]
    for index, entry in enumerate(found):
        if not entry or not all(isinstance(argument, Tensor) for argument in entry):
            kinds = ", ".join(type(argument).__name__ for argument in entry) or "nothing"
            raise ReparamError(
                f"--calibration {source}: batch {index} holds {kinds}; give a tensor, or a tuple "
                "of tensors, for each batch"
            )
    if not found:
        raise ReparamError(f"--calibration {source}: gave no batches")
    return found
