"""Replaces an ONNX file by another form of itself; its metadata and weights' file stay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orepa_compiler.dependencies import import_extra
from orepa_compiler.export.onnx.annotation import place_unnamed_nodes, set_properties
from orepa_compiler.export.onnx.external_data import SMALL_BYTES, external_files, name_by_content
from orepa_compiler.export.onnx.reading import load_graph

if TYPE_CHECKING:
    import onnx_ir as ir


def save_model(model: ir.Model, path: Path, *, beside: bool) -> None:
    """Writes a model whose weights are read, with all but the small ones beside it if asked."""
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    weights = f"{path.name}.data" if beside else None
    onnx_ir.save(model, path, external_data=weights, size_threshold_bytes=SMALL_BYTES)


def replace_file(draft: Path, candidate: Path) -> None:
    """Puts the ONNX file `candidate` in the place of `draft`, with the metadata that it had.

    A node keeps its torch module; one that is new gets that of the nodes that read it.
    """
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    before, after = load_graph(draft), load_graph(candidate)
    known = {output.name: node for node in before.graph.all_nodes() for output in node.outputs}
    named = {
        (node.name or "", node.op_type): node for node in before.graph.all_nodes() if node.name
    }
    nodes = list(after.graph.all_nodes())
    for node in nodes:
        # by its name first: it may give what an activation gave that was joined with it
        origin = named.get((node.name or "", node.op_type)) or next(
            (known[output.name] for output in node.outputs if output.name in known), None
        )
        if origin is not None:
            set_properties(node, origin.metadata_props)
    place_unnamed_nodes(nodes)
    set_properties(after, before.metadata_props)
    for name in external_files(before):
        draft.with_name(name).unlink()
    name_by_content(after, draft)
    onnx_ir.save(after, draft)
    candidate.unlink()
