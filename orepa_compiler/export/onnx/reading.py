"""Reads an ONNX file into onnx_ir's model, the one form that it has here, or refuses it.

What needs the package onnx itself is here and where its checker is asked: it parses the file, and
infers shapes. And the messages are looked through before onnx_ir has them, as it takes a path out
of the folder, raises bare errors for a size that is none, and drops one of two weights of one name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

_DIGITS_OF_A_SIZE = 16  # a petabyte
_LONGEST_REASON = 300


def load_graph(path: Path) -> ir.Model:
    """Reads the ONNX file at `path`, without the values of weights that lie in other files.

    Raises ExportError when there is no such file, when it is not a whole ONNX file, when its graph
    contradicts itself, and for external data that is not in the file's folder, or has no size.
    """
    onnx = import_extra("onnx", extra="onnx")
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    decode_error = import_extra("google.protobuf.message", extra="onnx").DecodeError
    if not path.is_file():
        raise ExportError(f"{path}: no such file; write it with orepa.export_onnx(model, ...)")
    try:
        message = onnx.load(path, load_external_data=False)
    except decode_error as error:
        raise ExportError(
            f"{path}: not a whole ONNX file ({path.stat().st_size} bytes; {error}); export it again"
        ) from error
    if not message.graph.node:
        raise ExportError(f"{path}: the ONNX file holds no nodes; export it again")
    _check_weights(path, message)
    try:
        model: ir.Model = onnx_ir.from_proto(message)
    except Exception as error:  # onnx_ir lets out what its parts raise, of every type
        raise _contradiction(path, error) from error
    _check_texts(path, model)
    onnx_ir.external_data.set_base_dir(model.graph, path.resolve().parent)
    return model


def to_message(model: ir.Model) -> Any:
    """Turns a model into onnx's own message; ExportError where it holds what onnx cannot write."""
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    try:
        return onnx_ir.to_proto(model)
    except Exception as error:  # onnx_ir lets out what its parts raise, of every type
        raise _contradiction("this model", error) from error


def inferred(model: ir.Model, *, with_values: bool = False) -> ir.Model:
    """Copies a model, with the types and shapes that ONNX infers for its values.

    with_values: also those that follow from the values of constants.
    Raises ExportError where the types contradict each other.
    """
    onnx = import_extra("onnx", extra="onnx")
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    message = to_message(model)
    try:
        typed = onnx.shape_inference.infer_shapes(message, data_prop=with_values)
    # the others for what its C++ cannot hold: sizes of 2^62, for one
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError, MemoryError) as error:
        raise ExportError(f"the ONNX graph contradicts itself: {error}; export it again") from error
    copy: ir.Model = onnx_ir.from_proto(typed)
    return copy


def values_of(tensor: ir.TensorProtocol | None) -> np.ndarray:
    """Reads the values of a weight; ExportError where the file does not hold what it says."""
    assert tensor is not None
    with _as_refusal(tensor):
        return tensor.numpy()


def bytes_of(tensor: ir.TensorProtocol) -> bytes:
    """Reads the bytes of a weight; ExportError where the file does not hold what it says."""
    with _as_refusal(tensor):
        return tensor.tobytes()


@contextmanager
def _as_refusal(tensor: ir.TensorProtocol) -> Iterator[None]:
    try:
        yield
    # what onnx_ir and numpy raise for values that are no such array, or lie in no such file
    except (ValueError, TypeError, AssertionError, OSError, MemoryError) as error:
        raise ExportError(
            f"weight {tensor.name}: its values are no {tensor.dtype.name} of shape "
            f"{list(tensor.shape)}: {_reason(error)}; export the file again"
        ) from error


def is_beside(name: str) -> bool:
    """Whether a path stays in the folder that it is taken from: not absolute, and without `..`."""
    parts = name.replace("\\", "/").split("/")
    is_absolute = name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":")
    return bool(name) and "\0" not in name and not is_absolute and ".." not in parts


def _check_weights(path: Path, message: Any) -> None:
    names: set[str] = set()
    for tensor in message.graph.initializer:
        if not tensor.name or tensor.name in names:
            raise ExportError(
                f"{path}: two weights have the name {tensor.name!r}, or it is empty; each needs "
                "one of its own. Export it again"
            )
        names.add(tensor.name)
    bodies = [message.graph, *message.functions]
    for tensor in (tensor for body in bodies for tensor in _tensors(body)):
        if tensor.external_data:
            _check_place(tensor)


def _tensors(body: Any) -> Iterator[Any]:
    """Yields every tensor of a graph or of a function, as onnx's messages."""
    yield from getattr(body, "initializer", ())
    for node in body.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _check_place(tensor: Any) -> None:
    fields = {entry.key: entry.value for entry in tensor.external_data}
    location = fields.get("location", "")
    if not is_beside(location):
        raise ExportError(
            f"weight {tensor.name}: lies in {location!r}; external data lies in the folder of "
            "the ONNX file: no absolute path, and none through .."
        )
    for key in ("offset", "length"):
        text = fields.get(key, "0")
        if not (text.isascii() and text.isdecimal() and len(text) < _DIGITS_OF_A_SIZE):
            raise ExportError(
                f"weight {tensor.name}: its {key} is {text[:40]!r}, and no size in bytes"
            )


def _check_texts(path: Path, model: ir.Model) -> None:
    """Refuses names that are no text: what is not UTF-8 comes out of onnx as bytes."""
    for node in model.graph.all_nodes():
        names = (value.name for value in (*node.inputs, *node.outputs) if value is not None)
        entries = node.metadata_props.items()
        for text in (node.name, node.op_type, *names, *(text for pair in entries for text in pair)):
            if isinstance(text, bytes):
                raise ExportError(f"{path}: {text[:40]!r} is no UTF-8 text; export it again")


def _contradiction(path: Path | str, error: Exception) -> ExportError:
    cause: BaseException = error
    while cause.__cause__ is not None:  # onnx_ir names every message on the way to the cause
        cause = cause.__cause__
    return ExportError(
        f"{path}: the ONNX graph contradicts itself: {_reason(cause)}; export it again"
    )


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:_LONGEST_REASON]
