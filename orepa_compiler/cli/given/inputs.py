"""Reads the user's own inputs: .npy, .npz, a folder of them or of images, or a function's."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from orepa_compiler.cli.given.forward_arguments import Batch, bound, in_forward_order
from orepa_compiler.errors import ReparamError
from orepa_compiler.model_source import call_source
from orepa_compiler.model_source.preprocessing import IMAGE_ENDINGS, Preprocessing

_ENDINGS = (".npy", ".npz")

# Of a folder with more images, this many are taken, spread over the whole of it.
MOST_IMAGES = 256


def load_inputs(
    source: Path | str,
    batch: int,
    *,
    option: str = "--inputs",
    images: Preprocessing | None = None,
    model: nn.Module | None = None,
) -> list[Batch]:
    """Batches of at most `batch` samples, in the order of the files.

    source: a .npy file is one input, its first axis the samples; a .npz file holds one array for
    each input, by the names of the model's arguments or in their order; a folder holds such files,
    or images, in folders of their own or not; `package.module:function` or `file.py:function` gives
    a tensor, a tuple of arguments, a list of such batches, a generator or a DataLoader.
    Floating arrays come as float32, as a model takes them. option: what messages call it. images:
    how an image becomes an input. model: whose forward says which of a batch are its arguments.

    Raises ReparamError for what is not there or not of these kinds, that needs unpickling, or that
    holds no samples, not the same number for each input, or NaN.
    """
    path = Path(source)
    if not path.exists() and ":" in str(source):
        return _given(str(source), option, model)
    files = _files(path, option) if path.is_dir() else [path]
    if any(file.suffix.lower() in IMAGE_ENDINGS for file in files):
        return _image_batches(path, files, batch, option, images or Preprocessing())
    return [part for file in files for part in _split(_read(file, option, model), batch)]


def check_source(source: str, option: str) -> None:
    """Raises ReparamError for a source that is neither a file or folder nor names a function."""
    path = Path(source)
    place = Path(source.rpartition(":")[0])
    if not path.exists() and ":" not in source:
        raise ReparamError(f"{option} {source}: there is no such file or folder")
    if not path.exists() and place.suffix == ".py" and not place.is_file():
        raise ReparamError(f"{option} {source}: there is no file {place}")


def _files(path: Path, option: str) -> list[Path]:
    """The files of a folder that are inputs; of the rest, one line says that they are ignored."""
    visible = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.parts)
    ]
    arrays = [file for file in visible if file.suffix in _ENDINGS]
    images = [file for file in visible if file.suffix.lower() in IMAGE_ENDINGS]
    if arrays and images:
        raise ReparamError(
            f"{option} {path}: holds both arrays ({arrays[0].name}) and images ({images[0].name}); "
            "keep one kind in a folder"
        )
    found = arrays or images
    if not found:
        raise ReparamError(
            f"{option} {path}: this folder holds no .npy or .npz files and no images"
        )
    strays = [file for file in visible if file not in set(found)]
    if strays:
        name = strays[0].name
        many = f"{len(strays)} other files are ignored ({name}, ...)"
        told = many if len(strays) > 1 else f"1 other file is ignored ({name})"
        print(f"{option} {path}: {told}", file=sys.stderr)
    return found


def _image_batches(
    path: Path, files: list[Path], batch: int, option: str, images: Preprocessing
) -> list[Batch]:
    step = max(1, -(-len(files) // MOST_IMAGES))
    taken = files[::step]
    if step > 1:
        line = f"{option} {path}: {len(taken)} of {len(files)} images are taken, every {step}th"
        print(line, file=sys.stderr)
    pixels = torch.stack([images(file) for file in taken])
    return [(part,) for part in pixels.split(batch)]


def _read(path: Path, option: str, model: nn.Module | None) -> Batch:
    if not path.is_file():
        raise ReparamError(f"{option} {path}: there is no such file or folder")
    if path.suffix not in _ENDINGS:
        raise ReparamError(
            f"{option} {path}: give a .npy or .npz file, a folder of them or of images, or "
            "file.py:function"
        )
    try:
        loaded = np.load(path, allow_pickle=False)
        if path.suffix == ".npy":
            named = {"": _tensor(loaded)}
        else:
            named = {name: _tensor(loaded[name]) for name in loaded.files}
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise ReparamError(f"{option} {path}: cannot be read ({error})") from error
    tensors = tuple(named.values())
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no arrays"
        raise ReparamError(
            f"{option} {path}: holds {shapes}; the first axis counts the samples, and must be the "
            "same and not 0 in every array"
        )
    for name, tensor in named.items():
        _check_finite(f"{option} {path}{f' ({name})' if name else ''}", tensor)
    by_name = bound(model, named) if model is not None and "" not in named else None
    return by_name or tensors


def _check_finite(where: str, tensor: Tensor) -> None:
    bad = None
    if tensor.is_floating_point() and len(tensor):
        bad = ~tensor.isfinite().reshape(len(tensor), -1).all(dim=1)
    if bad is not None and bad.any():
        raise ReparamError(
            f"{where}: {int(bad.sum())} of {len(tensor)} samples hold NaN or infinity, the first "
            f"is sample {int(bad.nonzero()[0])}; nothing can be compared on them"
        )


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.float() if tensor.is_floating_point() else tensor


def _split(tensors: Batch, batch: int) -> list[Batch]:
    return list(zip(*(tensor.split(batch) for tensor in tensors), strict=True))


def _given(source: str, option: str, model: nn.Module | None) -> list[Batch]:
    """The batches of a function of the user's own."""
    batches: list[Batch] = []
    for index, entry in enumerate(_entries(source, call_source(source))):
        arguments = in_forward_order(entry, model)
        leaves = pytree.tree_leaves(arguments)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            kinds = ", ".join(type(leaf).__name__ for leaf in leaves) or "nothing"
            raise ReparamError(
                f"{option} {source}: batch {index} holds {kinds}; give a tensor, a tuple of the "
                "model's arguments, or a dict of them by name, for each batch"
            )
        for leaf in leaves:
            if isinstance(leaf, Tensor) and not leaf.numel():
                raise ReparamError(
                    f"{option} {source}: batch {index} holds a tensor of shape "
                    f"{tuple(leaf.shape)}, which has no values"
                )
            if isinstance(leaf, Tensor) and leaf.ndim:
                _check_finite(f"{option} {source}: batch {index}", leaf)
        batches.append(arguments)
    if not batches:
        raise ReparamError(f"{option} {source}: gave no batches")
    return batches


def _entries(source: str, given: Any) -> Iterable[Any]:
    """One entry for each batch; at most MOST_IMAGES samples of a DataLoader."""
    if isinstance(given, (Tensor, tuple, Mapping)):
        return [given]
    if isinstance(given, Sequence):
        return given
    if not isinstance(given, Iterable):
        raise ReparamError(
            f"{source}: gave a {type(given).__name__}; give a tensor, a tuple of arguments, a list "
            "of such batches or a DataLoader"
        )
    taken, samples = [], 0
    for entry in given:
        taken.append(entry)
        first = next((t for t in pytree.tree_leaves(entry) if isinstance(t, Tensor)), None)
        samples += len(first) if first is not None and first.ndim else 1
        if samples >= MOST_IMAGES:
            break
    return taken
