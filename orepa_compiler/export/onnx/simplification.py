"""onnxsim on an exported file: the torch modules are kept, and the outputs are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.external_data import external_files
from orepa_compiler.export.onnx.program import quiet
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.export.onnx.rewriting import replace_file, save_model
from orepa_compiler.export.run.runners import OnnxRunner

# Largest difference, relative to the largest output: folding constants reorders a few roundings.
TOLERANCES = {torch.float16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-10}


def simplify_file(path: Path, batch: tuple[Any, ...]) -> None:
    """Rewrites the ONNX file at `path`, and its weights' file where it has one, with onnxsim.

    batch: the arguments on which the file must give the same outputs before and after.
    Raises ExportError where the outputs differ or cannot be compared; MissingPackage without
    onnxsim or onnxruntime.
    """
    onnxsim = import_extra("onnxsim", extra="simplify")
    onnx_ir = import_extra("onnx_ir", extra="onnx")
    beside = bool(external_files(load_graph(path)))
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    expected = OnnxRunner(path)(*tensors)
    # Without its check_n, onnxsim's own verdict compares nothing; with it, random inputs.
    with quiet():
        after, _ = onnxsim.simplify(str(path))
    candidate = path.with_name(f"simplified-{path.name}")
    save_model(onnx_ir.from_proto(after), candidate, beside=beside)
    check_same(expected, OnnxRunner(candidate)(*tensors))
    replace_file(path, candidate)


def check_same(expected: Tensor | dict[str, Tensor], outputs: Tensor | dict[str, Tensor]) -> None:
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
