"""Every torch module's output inside an ONNX file, from one onnxruntime session."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.inspection import (
    input_names,
    node_outputs,
    torch_module,
    value_names,
)
from orepa_compiler.export.onnx.reading import inferred, load_graph
from orepa_compiler.export.run.session import first_line, plain_session, run_session

if TYPE_CHECKING:
    import onnx_ir as ir


def boundary_values(graph: ir.Graph) -> dict[str, str]:
    """Finds, for each torch module, the one tensor that its nodes make and others read.

    A module with several such tensors, or with none, is left out: which one it returned is unknown.
    """
    made: dict[str, set[str]] = defaultdict(set)
    readers: dict[str, list[str]] = defaultdict(list)
    for node in graph:
        module = torch_module(node)
        for name in input_names(node):
            readers[name].append(module or "")
        for prefix in _prefixes(module):
            made[prefix].update(name for name in node_outputs(node) if name)
    returned = {*value_names(graph.outputs)}
    values = {}
    for prefix, names in made.items():
        seen = [
            name
            for name in names
            if name in returned or any(prefix not in _prefixes(m) for m in readers[name])
        ]
        if len(seen) == 1:
            values[prefix] = seen[0]
    return values


def _prefixes(module: str | None) -> list[str]:
    """Lists all that layer1.0.conv1 lies in: layer1, layer1.0 and itself, without the root."""
    parts = module.split(".") if module else []
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def onnx_outputs(path: Path, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gives the output of each torch module inside the ONNX file on these inputs, on the CPU.

    The session runs the graph as it is written, without onnxruntime's optimizations.
    Raises ExportError where the file cannot be run.
    """
    values = boundary_values(load_graph(path).graph)
    found = tapped(path, values.values(), tensors)
    return {module: found[name] for module, name in values.items() if name in found}


def _return_too(model: ir.Model, names: Collection[str]) -> None:
    """Makes the values of these names outputs of the model, where their types are known."""
    typed = inferred(model, with_values=True).graph
    known = {value.name: value for node in typed for value in node.outputs if value.type}
    made = {value.name: value for node in model.graph for value in node.outputs}
    for name in sorted(names):
        if name in known and not made[name].is_graph_output():
            made[name].type, made[name].shape = known[name].type, known[name].shape
            model.graph.outputs.append(made[name])


def tapped(path: Path, names: Iterable[str], tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Values inside an ONNX file by name, its inputs too; those of unknown shape are left out.

    Raises ExportError where the file cannot be run.
    """
    model, tensors = load_graph(path), list(tensors)
    given = dict(zip(value_names(model.graph.inputs), tensors, strict=False))
    asked = set(names)
    _return_too(model, asked)
    session = plain_session(path, model)
    try:
        found = run_session(session, path, tensors)
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{path}: onnxruntime failed: {first_line(error)}") from error
    return {name: value for name, value in {**given, **found}.items() if name in asked}
