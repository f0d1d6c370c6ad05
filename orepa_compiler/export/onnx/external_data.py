"""Writes the weights beside an ONNX file, named by their content, so no old pair is broken.

An ONNX file with external weights is two files, and no two renames are one. A name that is the
hash of the content makes them safe: new weights lie beside the old ones, and the one rename of the
.onnx goes from the old pair to the new pair.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.inspection import load_graph
from orepa_compiler.files.atomic import locked

_CHUNK = 1 << 20
_HASH_DIGITS = 16
_DIGITS_OF_A_SIZE = 16  # a petabyte


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_beside(name: str) -> bool:
    """Whether a path stays in the folder that it is taken from: not absolute, and without `..`."""
    parts = name.replace("\\", "/").split("/")
    is_absolute = name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":")
    return bool(name) and "\0" not in name and not is_absolute and ".." not in parts


@dataclass(frozen=True)
class ExternalPart:
    """Where the values of a tensor lie: in the file `location`; length 0 is up to its end."""

    location: str
    offset: int
    length: int

    @classmethod
    def of(cls, tensor: Any) -> ExternalPart:
        """What a tensor says. Raises ExportError for a path that leaves the folder, or no size."""
        fields = {entry.key: entry.value for entry in tensor.external_data}
        location = fields.get("location", "")
        if not is_beside(location):
            raise ExportError(
                f"weight {tensor.name}: lies in {location!r}; external data lies in the folder of "
                "the ONNX file: no absolute path, and none through .."
            )
        return cls(location, *(_size(tensor, fields, key) for key in ("offset", "length")))


def _size(tensor: Any, fields: dict[str, str], key: str) -> int:
    text = fields.get(key, "0")
    if not (text.isascii() and text.isdecimal() and len(text) < _DIGITS_OF_A_SIZE):
        raise ExportError(f"weight {tensor.name}: its {key} is {text[:40]!r}, and no size in bytes")
    return int(text)


def external_tensors(model: Any) -> Iterator[Any]:
    """Every tensor of an ONNX model whose values lie in another file."""
    yield from (tensor for tensor in _tensors(model.graph) if tensor.external_data)


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for body in (attribute.g, *attribute.graphs):
                yield from _tensors(body)


def external_files(model: Any) -> list[str]:
    """The names of the files that hold weights of an ONNX model, as it writes them.

    Raises ExportError for one that does not lie in the model's own folder.
    """
    return sorted({ExternalPart.of(tensor).location for tensor in external_tensors(model)})


def load_external(path: Path, model: Any) -> None:
    """Reads the weights that lie in files beside `path` into the ONNX model that was read there.

    Raises ExportError as check_external does.
    """
    if not external_files(model):
        return
    check_external(path, model)
    folder = str(path.resolve().parent)
    helper = import_extra("onnx.external_data_helper", extra="onnx")
    helper.load_external_data_for_model(model, folder)


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
        with locked(target.parent):
            used = {target.parent / name for name in external_files(load_graph(target))}
            for file in companions - used:
                file.unlink(missing_ok=True)


def check_external(path: Path, model: Any) -> None:
    """Raises ExportError where weights that lie beside the ONNX file are not there, or not whole.

    A file that this package wrote bears its content's hash, which is checked.
    """
    for name, size in _needed_sizes(model):
        file = path.resolve().parent / name
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
    ends: dict[str, int] = {}
    for tensor in external_tensors(model):
        part = ExternalPart.of(tensor)
        ends[part.location] = max(part.offset + part.length, ends.get(part.location, 0))
    yield from sorted(ends.items())
