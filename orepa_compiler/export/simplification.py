"""onnxsim on an exported file: the torch modules are kept, and the outputs are compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.annotation import set_properties
from orepa_compiler.export.inspection import load_graph, walk
from orepa_compiler.export.runners import OnnxRunner
from orepa_compiler.export.tracing import quiet

# Largest difference, relative to the largest output: folding constants reorders a few roundings.
TOLERANCES = {torch.float16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-10}


def simplify_file(path: Path, batch: tuple[Any, ...]) -> None:
    """Rewrites the ONNX file at `path` with onnxsim.

    batch: the arguments on which the file must give the same outputs before and after.
    Raises ExportError where the outputs differ or cannot be compared, and for external weights;
    MissingPackage without onnxsim or onnxruntime.
    """
    onnx = import_extra("onnx", extra="onnx")
    onnxsim = import_extra("onnxsim", extra="simplify")
    before = load_graph(path)
    if any(tensor.external_data for tensor in before.graph.initializer):
        raise ExportError("simplify=True needs all weights in one file; export without it")
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    expected = OnnxRunner(path)(*tensors)
    # Without its check_n, onnxsim's own verdict compares nothing; with it, random inputs.
    with quiet():
        after, _ = onnxsim.simplify(before)
    _restore(before, after)
    candidate = path.with_name(f"simplified-{path.name}")
    onnx.save(after, candidate)
    compare(expected, OnnxRunner(candidate)(*tensors))
    os.replace(candidate, path)


def _restore(before: Any, after: Any) -> None:
    known = {output: node for node in walk(before.graph) for output in node.output}
    for node in walk(after.graph):
        origin = next((known[output] for output in node.output if output in known), None)
        if origin is not None:
            set_properties(node, {entry.key: entry.value for entry in origin.metadata_props})
    set_properties(after, {entry.key: entry.value for entry in before.metadata_props})


def compare(expected: Tensor | dict[str, Tensor], outputs: Tensor | dict[str, Tensor]) -> None:
    """Raises ExportError where the outputs of the two files differ."""
    first = expected if isinstance(expected, dict) else {"output": expected}
    second = outputs if isinstance(outputs, dict) else {"output": outputs}
    if first.keys() != second.keys():
        raise ExportError(f"simplify=True changed the outputs {[*first]} to {[*second]}")
    for name, tensor in first.items():
        if not agree(tensor, second[name]):
            raise ExportError(
                f"simplify=True changed the values of output {name}; export without it"
            )


def agree(reference: Tensor, candidate: Tensor) -> bool:
    """Whether two outputs are the same up to the rounding of their type.

    Never where there is nothing to compare, or with NaN or inf.
    """
    same = (reference.shape, reference.dtype) == (candidate.shape, candidate.dtype)
    if not same or not reference.numel():
        return False
    if not reference.is_floating_point():
        return torch.equal(reference, candidate)
    scale = reference.double().abs().amax()
    error = (reference.double() - candidate.double()).abs().amax()
    return bool(error <= TOLERANCES[reference.dtype] * scale) and bool(scale.isfinite())
