"""The file of weights beside an ONNX file: named by its content, so that no old pair is broken.

An ONNX file with external weights is two files, and no two renames are one. A name that is the
hash of the content makes them safe: new weights lie beside the old ones, and the one rename of the
.onnx goes from the old pair to the new pair.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.inspection import load_graph

_CHUNK = 1 << 20
_HASH_DIGITS = 16


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def external_files(model: Any) -> list[str]:
    """The names of the files that hold weights of an ONNX model, as it writes them."""
    return sorted(
        {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
    )


def name_by_content(model: Any, draft: Path) -> None:
    """Renames the weights' file beside `draft` to NAME.HASH.data, in the model too."""
    for name in external_files(model):
        file = draft.with_name(name)
        named = f"{draft.name}.{sha256(file)[:_HASH_DIGITS]}.data"
        os.replace(file, file.with_name(named))
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location" and entry.value == name:
                    entry.value = named


def own_companions(target: Path) -> set[Path]:
    """The weights' files beside `target` that an export to the same path made; none else."""
    pattern = re.compile(rf"{re.escape(target.name)}\.[0-9a-f]{{{_HASH_DIGITS}}}\.data")
    return {file for file in target.parent.glob("*.data") if pattern.fullmatch(file.name)}


def remove_stale(target: Path) -> None:
    """Removes the weights of earlier exports to `target`, which nothing names any more."""
    companions = own_companions(target)
    if companions:
        used = {target.parent / name for name in external_files(load_graph(target))}
        for file in companions - used:
            file.unlink(missing_ok=True)


def check_external(path: Path, model: Any) -> None:
    """Raises ExportError where weights that lie beside the ONNX file are not there, or not whole.

    A file that this package wrote bears its content's hash, which is checked.
    """
    for name, size in _needed_sizes(model):
        file = path.with_name(name)
        if not file.is_file():
            raise ExportError(
                f"{path}: its weights lie in {name}, and there is no such file beside it; copy "
                "both files together"
            )
        if file.stat().st_size < size:
            raise ExportError(
                f"{file}: has {file.stat().st_size} bytes, and {path.name} reads {size}: it was "
                "cut off; copy it again"
            )
        stem, _, digits = name.removesuffix(".data").rpartition(".")
        is_named = name.endswith(".data") and re.fullmatch(rf"[0-9a-f]{{{_HASH_DIGITS}}}", digits)
        if stem and is_named and not sha256(file).startswith(digits):
            raise ExportError(
                f"{file}: its content has changed since the export (sha256 "
                f"{sha256(file)[:_HASH_DIGITS]}, its name says {digits}); export it again"
            )


def _needed_sizes(model: Any) -> Iterator[tuple[str, int]]:
    """Every file of weights, with the bytes that it must have at least."""
    external_info = import_extra("onnx.external_data_helper", extra="onnx").ExternalDataInfo
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.external_data:
            info = external_info(tensor)
            end = (info.offset or 0) + (info.length or 0)
            ends[info.location] = max(end, ends.get(info.location, 0))
    yield from sorted(ends.items())
