"""The user's own inputs from files: .npy, .npz, or a folder of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orepa_compiler.errors import ReparamError

_ENDINGS = (".npy", ".npz")


def load_inputs(path: Path, batch: int, *, option: str = "--inputs") -> list[tuple[Tensor, ...]]:
    """Batches of at most `batch` samples, in the order of the files.

    path: a .npy file is one input, its first axis the samples; a .npz file holds one array for each
    input, in the order of the model's arguments; a folder holds such files, all of one model.
    Floating arrays come as float32, as a model takes them. option: what messages call it.

    Raises ReparamError for a file that is not there or not of these kinds, that needs unpickling,
    or that holds no samples, or not the same number for each input.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in _ENDINGS] if path.is_dir() else files
    if not files:
        raise ReparamError(f"{option} {path}: this folder holds no .npy or .npz files")
    return [part for file in files for part in _split(_read(file, option), batch)]


def _read(path: Path, option: str) -> tuple[Tensor, ...]:
    if not path.is_file():
        raise ReparamError(f"{option} {path}: there is no such file or folder")
    if path.suffix not in _ENDINGS:
        raise ReparamError(f"{option} {path}: give a .npy or .npz file, or a folder of them")
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = [loaded] if path.suffix == ".npy" else [loaded[name] for name in loaded.files]
        tensors = tuple(_tensor(array) for array in arrays)
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise ReparamError(f"{option} {path}: cannot be read ({error})") from error
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no arrays"
        raise ReparamError(
            f"{option} {path}: holds {shapes}; the first axis counts the samples, and must be the "
            "same and not 0 in every array"
        )
    return tensors


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.float() if tensor.is_floating_point() else tensor


def _split(tensors: tuple[Tensor, ...], batch: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(batch) for tensor in tensors), strict=True))
