"""Names and metadata in an ONNX graph: what the exporter writes, made readable."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

from orepa_compiler.export.onnx.images import renamed, size_symbols
from orepa_compiler.export.onnx.inspection import MODULE_KEY, torch_module, walk

# What torch's exporter writes for each node: the module paths from the root down, then the node.
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
# It also writes the stack trace, with the paths of the machine that exported.
_STACK_KEY = "pkg.torch.onnx.stack_trace"


def name_values(graph: Any, outputs: Sequence[str], inputs: Sequence[str] = ()) -> None:
    """Names the outputs of an onnx_ir graph, and its inputs where names are given.

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


def annotate(model: Any, properties: dict[str, str], modules: Collection[str] = ()) -> None:
    """Writes each node's torch module, the model's properties, and names of symbols.

    modules: the paths of those with a weight.
    """
    nodes = list(walk(model.graph))
    for node in nodes:
        entries = {entry.key: entry.value for entry in node.metadata_props}
        entries.pop(_STACK_KEY, None)
        if _SCOPES_KEY in entries:
            # The path before the node's own name is that of the module whose forward ran it.
            scopes = ast.literal_eval(entries[_SCOPES_KEY])
            entries[MODULE_KEY] = _from_the_root(scopes[:-1], modules)
        set_properties(node, entries)
    place_unnamed_nodes(nodes)
    set_properties(model, properties)
    _name_symbols(model.graph)


def _from_the_root(scopes: list[str], modules: Collection[str]) -> str:
    """The path of the innermost module; "" is the root's.

    torch names the child of a module whose forward was bound to it (module.forward = ...) from
    that module, and not from the root.
    """
    path = scopes[-1] if scopes else ""
    whole = f"{scopes[-2]}.{path}" if len(scopes) > 1 and scopes[-2] else path
    return whole if path not in modules and whole in modules else path


def place_unnamed_nodes(nodes: Sequence[Any]) -> None:
    """Gives a node that an optimizer made the deepest module that holds its readers."""
    readers: dict[str, list[str]] = defaultdict(list)
    for node in reversed(nodes):
        modules = [module for output in node.output for module in readers[output]]
        if torch_module(node) is None and modules:
            levels = zip(*(module.split(".") for module in modules), strict=False)
            common = takewhile(lambda level: len(set(level)) == 1, levels)
            node.metadata_props.add(key=MODULE_KEY, value=".".join(level[0] for level in common))
        module = torch_module(node)
        if module is not None:
            for name in node.input:
                readers[name].append(module)


def set_properties(message: Any, properties: dict[str, str]) -> None:
    """Replaces the metadata_props of a node or a model."""
    del message.metadata_props[:]
    for key, value in properties.items():
        message.metadata_props.add(key=key, value=value)


def _name_symbols(graph: Any) -> None:
    """Calls the inputs' first axis `batch`, and sizes `height` and `width`, also inside 4*s7."""
    shapes = [(value.name, _axes(value)) for value in graph.input]
    symbols = {axes[0] for _, axes in shapes if axes and isinstance(axes[0], str)} - {""}
    names = size_symbols(shapes)
    if len(symbols) == 1:  # of several the check of the file speaks
        names[symbols.pop()] = "batch"
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = renamed(dim.dim_param, names)


def _axes(value: Any) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
