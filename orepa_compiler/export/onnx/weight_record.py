"""Records a hash of each weight in an ONNX file, so that a changed bit has a place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.external_data import check_external
from orepa_compiler.export.onnx.inspection import input_names, torch_module
from orepa_compiler.export.onnx.reading import bytes_of, load_graph
from orepa_compiler.files.schemas import parsed

if TYPE_CHECKING:
    import onnx_ir as ir

WEIGHTS_KEY = "orepa.weights"

_DIGITS = 16


def record_weights(path: Path) -> None:
    """Writes the hash of every weight into the metadata of the ONNX file at `path`."""
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    model = load_graph(path)
    hashes = json.dumps(_hashes(model, path.parent), separators=(",", ":"))
    model.metadata_props[WEIGHTS_KEY] = hashes
    onnx_ir.save(model, path)


def check_weights(path: Path, model: ir.Model) -> int:
    """Counts the weights that are, bit by bit, those that were exported; 0 where none is recorded.

    Raises ExportError, with the torch module that reads it, for the first weight that changed, that
    is missing, or that was not there.
    """
    recorded = model.metadata_props.get(WEIGHTS_KEY)
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


def _reader(model: ir.Model, name: str) -> str | None:
    nodes = model.graph.all_nodes()
    return next((torch_module(node) for node in nodes if name in input_names(node)), None)


def _hashes(model: ir.Model, folder: Path) -> dict[str, str]:
    return {name: _hash(t, folder) for name, t in model.graph.initializers.tensor_items()}


def _hash(tensor: ir.TensorProtocol, folder: Path) -> str:
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    head = f"{tensor.dtype.value} {tuple(tensor.shape.numpy())}".encode()
    if isinstance(tensor, onnx_ir.ExternalTensor):
        with (folder / tensor.location).open("rb") as file:
            file.seek(tensor.offset or 0)
            content = file.read(tensor.length) if tensor.length else file.read()
    elif isinstance(tensor, onnx_ir.StringTensor):
        content = json.dumps([text.hex() for text in tensor.string_data()]).encode()
    else:
        content = bytes_of(tensor)
    return hashlib.sha256(head + content).hexdigest()[:_DIGITS]
