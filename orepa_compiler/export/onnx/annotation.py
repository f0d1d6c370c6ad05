"""Names and metadata in an ONNX graph: what the exporter writes, made readable."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from orepa_compiler.dependencies import import_extra
from orepa_compiler.export.onnx.images import renamed, size_symbols
from orepa_compiler.export.onnx.inspection import MODULE_KEY, torch_module

if TYPE_CHECKING:
    import onnx_ir as ir

# What torch's exporter writes for each node: the module paths from the root down, then the node.
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
# It also writes the stack trace, with the paths of the machine that exported.
_STACK_KEY = "pkg.torch.onnx.stack_trace"


def name_values(graph: ir.Graph, outputs: Sequence[str], inputs: Sequence[str] = ()) -> None:
    """Names the outputs of a graph, and its inputs where names are given.

    What else has such a name gets another.
    """
    returned = {id(value) for value in graph.outputs}
    for value in graph.inputs:
        if value.name in outputs or value.name in inputs:
            value.name = f"input_{value.name}"
    computed = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*computed, *graph.initializers.values()):
        if value.name in (*outputs, *inputs) and id(value) not in returned:
            value.name = f"{value.name}_value"
    for value, name in zip(graph.inputs, inputs, strict=False):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=False):
        value.name = name


def annotate(model: ir.Model, properties: Mapping[str, str], modules: Collection[str] = ()) -> None:
    """Writes each node's torch module, the model's properties, and names of symbols.

    modules: the paths of those with a weight.
    """
    nodes = list(model.graph.all_nodes())
    for node in nodes:
        entries = node.metadata_props
        entries.pop(_STACK_KEY, None)
        if _SCOPES_KEY in entries:
            # The path before the node's own name is that of the module whose forward ran it.
            scopes = ast.literal_eval(entries[_SCOPES_KEY])
            entries[MODULE_KEY] = _from_the_root(scopes[:-1], modules)
    place_unnamed_nodes(nodes)
    set_properties(model, properties)
    _name_symbols(model)


def _from_the_root(scopes: list[str], modules: Collection[str]) -> str:
    """Joins the path of the innermost module; "" is the root's.

    torch names the child of a module whose forward was bound to it (module.forward = ...) from
    that module, and not from the root.
    """
    path = scopes[-1] if scopes else ""
    whole = f"{scopes[-2]}.{path}" if len(scopes) > 1 and scopes[-2] else path
    return whole if path not in modules and whole in modules else path


def place_unnamed_nodes(nodes: Sequence[ir.Node]) -> None:
    """Gives a node that an optimizer made the deepest module that holds its readers."""
    for node in reversed(nodes):
        if torch_module(node) is None and (modules := list(_reading_modules(node))):
            levels = zip(*(module.split(".") for module in modules), strict=False)
            common = takewhile(lambda level: len(set(level)) == 1, levels)
            node.metadata_props[MODULE_KEY] = ".".join(level[0] for level in common)


def _reading_modules(node: ir.Node) -> Iterator[str]:
    for output in node.outputs:
        for use in output.uses():
            module = torch_module(use.node)
            if module is not None:
                yield module


def set_properties(holder: ir.Node | ir.Model, properties: Mapping[str, str]) -> None:
    """Replaces the metadata of a node or a model."""
    entries = dict(properties)
    holder.metadata_props.clear()
    holder.metadata_props.update(entries)


def _name_symbols(model: ir.Model) -> None:
    """Calls the inputs' first axis `batch`, and sizes `height` and `width`, also inside 4*s7."""
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    graph = model.graph
    shapes = [(value.name or "", axes_of(value)) for value in graph.inputs]
    symbols = {axes[0] for _, axes in shapes if axes and isinstance(axes[0], str)} - {""}
    names = size_symbols(shapes)
    if len(symbols) == 1:  # of several the check of the file speaks
        names[symbols.pop()] = "batch"
    computed = (value for node in graph.all_nodes() for value in node.outputs)
    for value in dict.fromkeys((*graph.inputs, *graph.outputs, *computed)):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                renamed(axis, names) or None if isinstance(axis, str) else axis
                for axis in axes_of(value)
            )


def axes_of(value: ir.Value) -> list[str | int]:
    """Lists the axes of a value: sizes, names of symbols, "" where nothing is known."""
    axes = value.shape or ()
    return [axis if isinstance(axis, int) else axis.value or "" for axis in axes]
