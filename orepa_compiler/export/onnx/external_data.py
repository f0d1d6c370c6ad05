"""Writes the weights beside an ONNX file, named by their content, so no old pair is broken.

An ONNX file with external weights is two files, and no two renames are one. A name that is the
hash of the content makes them safe: new weights lie beside the old ones, and the one rename of the
.onnx goes from the old pair to the new pair.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.reading import load_graph, values_of
from orepa_compiler.files.atomic import locked

if TYPE_CHECKING:
    import onnx_ir as ir

_CHUNK = 1 << 20
_HASH_DIGITS = 16
# Weights up to this size stay in the file where the others lie beside it.
SMALL_BYTES = 256


def sha256(path: Path) -> str:
    """Hashes a file with sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yields every tensor of an ONNX model whose values lie in another file."""
    found: list[ir.ExternalTensor] = []

    def keep(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        found.append(tensor)
        return tensor

    _replace_external(model, keep)
    yield from found


def _replace_external(
    model: ir.Model, change: Callable[[ir.ExternalTensor], ir.TensorProtocol]
) -> None:
    """Puts another tensor in the place of each whose values lie in another file."""
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, onnx_ir.ExternalTensor):
                value.const_value = change(value.const_value)
    for node in model.graph.all_nodes():
        for name, attribute in node.attributes.items():
            kind, held = attribute.type, attribute.value
            if isinstance(held, onnx_ir.ExternalTensor):
                node.attributes[name] = onnx_ir.AttrTensor(name, change(held))
            elif kind == onnx_ir.AttributeType.TENSORS:
                tensors = [change(t) if isinstance(t, onnx_ir.ExternalTensor) else t for t in held]
                node.attributes[name] = onnx_ir.AttrTensors(name, tensors)


def external_files(model: ir.Model) -> list[str]:
    """Names the files that hold weights of an ONNX model, as it writes them."""
    return sorted({str(tensor.location) for tensor in external_tensors(model)})


def load_external(path: Path, model: ir.Model) -> None:
    """Reads the weights that lie in files beside `path` into the ONNX model that was read there.

    Raises ExportError as check_external does.
    """
    if not external_files(model):
        return
    check_external(path, model)
    onnx_ir = import_extra("onnx_ir", extra="onnx")

    def read(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        values_of(tensor)
        (loaded,) = onnx_ir.external_data.convert_tensors_from_external([tensor])
        return loaded

    _replace_external(model, read)


def write_external(model: ir.Model, draft: Path) -> None:
    """Writes all but the small weights beside `draft`, into NAME.HASH.data."""
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    name = f"{draft.name}.data"
    onnx_ir.external_data.unload_from_model(
        model, draft.parent, name, size_threshold_bytes=SMALL_BYTES
    )
    name_by_content(model, draft)


def name_by_content(model: ir.Model, draft: Path) -> None:
    """Renames the weights' file beside `draft` to NAME.HASH.data, in the model too."""
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    names = {}
    for name in external_files(model):
        file = draft.with_name(name)
        names[name] = f"{draft.name}.{sha256(file)[:_HASH_DIGITS]}.data"
        os.replace(file, file.with_name(names[name]))

    def renamed(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        return onnx_ir.ExternalTensor(
            names[str(tensor.location)],
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=draft.parent,
        )

    _replace_external(model, renamed)


def own_companions(target: Path) -> set[Path]:
    """Finds the weights' files beside `target` that an export to the same path made; none else."""
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


def check_external(path: Path, model: ir.Model) -> None:
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


def _needed_sizes(model: ir.Model) -> Iterator[tuple[str, int]]:
    """Yields every file of weights, with the bytes that it must have at least."""
    ends: dict[str, int] = {}
    for tensor in external_tensors(model):
        end = (tensor.offset or 0) + (tensor.length or 0)
        ends[str(tensor.location)] = max(end, ends.get(str(tensor.location), 0))
    yield from sorted(ends.items())
