"""Casts each module to half precision, or keeps it in float32 where that is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.choices import Precision as Precision
from orepa_compiler.errors import ExportError

# The type of floating tensors; int8 lies between two nodes of a float32 graph.
PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
}
# The names of the same types in ONNX.
ELEMENT_TYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16", "int8": "FLOAT"}


def kept_modules(model: nn.Module, patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Lists the paths of the modules that `patterns` keep in float32, without those inside another.

    patterns: globs on module paths ("layer4.*"), where "*" spans dots too.
    Raises ExportError for a pattern that matches no module.
    """
    paths = [path for path, _ in model.named_modules() if path]
    kept: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [path for path in paths if fnmatchcase(path, pattern)]
        if not found:
            raise ExportError(
                f"keep_fp32: {pattern!r} matches none of the {len(paths)} modules; give a glob on "
                "module paths such as 'layer4.*'"
            )
        kept.update(found)
    outermost = (path for path in paths if path in kept)
    return tuple(path for path in outermost if not lies_in(path.rpartition(".")[0], kept))


def lies_in(path: str | None, modules: Collection[str]) -> bool:
    """Whether a module path is one of `modules` or inside one."""
    parts = path.split(".") if path else []
    return any(".".join(parts[: end + 1]) in modules for end in range(len(parts)))


def cast(model: nn.Module, dtype: torch.dtype, *, keep: Collection[str] = ()) -> nn.Module:
    """Copies the model, its floating tensors in `dtype`, and those in `keep` in float32.

    A kept module gets its inputs in float32, and its outputs are cast to `dtype` again.
    Raises ExportError where a finite value is beyond the range of `dtype`.
    """
    result = value_copy(model)
    for path, module in result.named_modules():
        own = torch.float32 if lies_in(path, keep) else dtype
        # torch's own: what a class puts around it (YOLO's, torchmetrics') goes into the children
        nn.Module._apply(module, lambda tensor, own=own: _typed(tensor, own), recurse=False)
    before = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in (*result.named_parameters(), *result.named_buffers()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            _check_range(name, before[name], tensor.dtype)
    for path in keep:
        module = result.get_submodule(path)
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        module.register_forward_hook(lambda module, inputs, output: cast_tensors(output, dtype))
    return result


def cast_tensors(values: Any, dtype: torch.dtype) -> Any:
    """Casts the floating tensors in a nested structure to `dtype`."""
    return pytree.tree_map(
        lambda leaf: _typed(leaf, dtype) if isinstance(leaf, Tensor) else leaf, values
    )


def _typed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _cast_inputs(module: nn.Module, arguments: Any, keywords: Any) -> tuple[Any, Any]:
    float32 = torch.float32
    return cast_tensors(arguments, float32), cast_tensors(keywords, float32)


def _check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    largest = (
        tensor[tensor.isfinite()].abs().max() if tensor.isfinite().any() else tensor.new_zeros(())
    )
    limit = torch.finfo(dtype).max
    if largest > limit:
        raise ExportError(
            f"its largest magnitude {largest.item():.4g} is beyond {dtype} (largest {limit:.4g}); "
            "export with precision='bf16' or 'fp32', or keep its module in float32 with keep_fp32",
            path=name,
        )
