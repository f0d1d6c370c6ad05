"""Every torch module's output inside an ONNX file, from one onnxruntime session."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.inspection import load_graph, torch_module
from orepa_compiler.export.run.session import first_line, plain_session, run_session


def boundary_values(graph: Any) -> dict[str, str]:
    """By torch module, the one tensor that its nodes make and others read.

    A module with several such tensors, or with none, is left out: which one it returned is unknown.
    """
    made: dict[str, set[str]] = defaultdict(set)
    readers: dict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        module = torch_module(node)
        for name in node.input:
            readers[name].append(module or "")
        for prefix in _prefixes(module):
            made[prefix].update(output for output in node.output if output)
    returned = {value.name for value in graph.output}
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
    """layer1.0.conv1 lies in layer1, layer1.0 and itself; the root is left out."""
    parts = module.split(".") if module else []
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def onnx_outputs(path: Path, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """By torch module, its output inside the ONNX file on these inputs, on the CPU.

    The session runs the graph as it is written, without onnxruntime's optimizations.
    Raises ExportError where the file cannot be run.
    """
    values = boundary_values(load_graph(path).graph)
    found = tapped(path, values.values(), tensors)
    return {module: found[name] for module, name in values.items() if name in found}


def tapped(path: Path, names: Iterable[str], tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Values inside an ONNX file by name, its inputs too; those of unknown shape are left out.

    Raises ExportError where the file cannot be run.
    """
    onnx = import_extra("onnx", extra="onnx")
    model, tensors = load_graph(path), list(tensors)
    given = dict(zip((value.name for value in model.graph.input), tensors, strict=False))
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True)
    known = {value.name: value for value in (*typed.graph.value_info, *typed.graph.output)}
    present = {value.name for value in model.graph.output}
    asked = set(names)
    wanted = sorted({name for name in asked if name in known} - present)
    model.graph.output.extend(known[name] for name in wanted)
    session = plain_session(path, model)
    try:
        found = run_session(session, path, tensors)
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{path}: onnxruntime failed: {first_line(error)}") from error
    return {name: value for name, value in {**given, **found}.items() if name in asked}
