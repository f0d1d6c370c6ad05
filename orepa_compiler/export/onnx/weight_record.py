"""Records a hash of each weight in an ONNX file, so that a changed bit has a place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.annotation import set_properties
from orepa_compiler.export.onnx.external_data import ExternalPart, check_external
from orepa_compiler.export.onnx.inspection import load_graph, torch_module, walk
from orepa_compiler.files.schemas import parsed

WEIGHTS_KEY = "orepa.weights"

_DIGITS = 16


def properties_of(model: Any) -> dict[str, str]:
    """The metadata of an ONNX model."""
    return {entry.key: entry.value for entry in model.metadata_props}


def record_weights(path: Path) -> None:
    """Writes the hash of every weight into the metadata of the ONNX file at `path`."""
    onnx = import_extra("onnx", extra="onnx")
    model = load_graph(path)
    hashes = json.dumps(_hashes(model, path.parent), separators=(",", ":"))
    set_properties(model, {**properties_of(model), WEIGHTS_KEY: hashes})
    onnx.save(model, path)


def check_weights(path: Path, model: Any) -> int:
    """How many weights are, bit by bit, those that were exported; 0 where none is recorded.

    Raises ExportError, with the torch module that reads it, for the first weight that changed, that
    is missing, or that was not there.
    """
    recorded = properties_of(model).get(WEIGHTS_KEY)
    check_external(path, model)
    if recorded is None:
        return 0
    what = f"{path}: {WEIGHTS_KEY}"
    then = parsed(recorded, what=what, error=ExportError)
    now = _hashes(model, path.resolve().parent)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            how = "has changed" if name in now and name in then else "is gone"
            if name not in then:
                how = "was not there"
            raise ExportError(
                f"{path}: its weight {name} {how} since the export (sha256 {now.get(name)}, then "
                f"{then.get(name)}); export it again",
                path=_reader(model, name),
            )
    return len(then)


def _reader(model: Any, name: str) -> str | None:
    return next((torch_module(node) for node in walk(model.graph) if name in node.input), None)


def _hashes(model: Any, folder: Path) -> dict[str, str]:
    return {tensor.name: _hash(tensor, folder) for tensor in model.graph.initializer}


def _hash(tensor: Any, folder: Path) -> str:
    onnx = import_extra("onnx", extra="onnx")
    head = f"{tensor.data_type} {tuple(tensor.dims)}".encode()
    if tensor.external_data:
        part = ExternalPart.of(tensor)
        with (folder / part.location).open("rb") as file:
            file.seek(part.offset)
            content = file.read(part.length) if part.length else file.read()
    else:
        content = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
    return hashlib.sha256(head + content).hexdigest()[:_DIGITS]
