"""Replaces an ONNX file by another form of itself; its metadata and weights' file stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orepa_compiler.dependencies import import_extra
from orepa_compiler.export.onnx.annotation import place_unnamed_nodes, set_properties
from orepa_compiler.export.onnx.external_data import external_files, name_by_content
from orepa_compiler.export.onnx.inspection import load_graph, makers, walk


def save_like(before: Any, after: Any, path: Path) -> None:
    """Writes `after` with its weights beside it where those of `before` are, and else in it."""
    onnx = import_extra("onnx", extra="onnx")
    if external_files(before):
        weights = f"{path.name}.data"
        onnx.save(after, path, save_as_external_data=True, location=weights, size_threshold=1024)
    else:
        onnx.save(after, path)


def replace_file(draft: Path, candidate: Path) -> None:
    """Puts the ONNX file `candidate` in the place of `draft`, with the metadata that it had.

    A node keeps its torch module; one that is new gets that of the nodes that read it.
    """
    onnx = import_extra("onnx", extra="onnx")
    before, after = load_graph(draft), load_graph(candidate)
    known = makers(before.graph)
    named = {(node.name, node.op_type): node for node in walk(before.graph) if node.name}
    nodes = list(walk(after.graph))
    for node in nodes:
        # by its name first: it may give what an activation gave that was joined with it
        origin = named.get((node.name, node.op_type)) or next(
            (known[output] for output in node.output if output in known), None
        )
        if origin is not None:
            set_properties(node, {entry.key: entry.value for entry in origin.metadata_props})
    place_unnamed_nodes(nodes)
    set_properties(after, {entry.key: entry.value for entry in before.metadata_props})
    for name in external_files(before):
        draft.with_name(name).unlink()
    name_by_content(after, draft)
    onnx.save(after, draft)
    candidate.unlink()
