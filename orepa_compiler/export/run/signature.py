"""Reads the inputs and outputs of an exported file, and checks whether tensors fit them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.annotation import axes_of

if TYPE_CHECKING:
    import onnx_ir as ir

# Where an element type has another name in torch.
_TYPES = {"FLOAT": "float32", "DOUBLE": "float64"}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an exported file.

    shape: sizes; a symbolic axis is its name (ONNX), or -1 (TensorRT).
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}: {text_of(self.dtype)} {text_of(self.shape)}"


def text_of(value: torch.dtype | Iterable[int | str]) -> str:
    """Writes a type or a shape as a message shows it: float32, (batch, 3, 64, 64)."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return f"({', '.join(map(str, value))})"


def match_inputs(
    path: Path, specs: Sequence[TensorSpec], inputs: Sequence[Tensor], named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Matches the tensors with the file's inputs, by name, in the file's order.

    Raises ExportError where one is missing, unknown, of another type, or of a shape that does not
    fit.
    """
    names = [spec.name for spec in specs]
    inputs = _flat(inputs, len(specs) - len(named))
    given = dict(zip(names, inputs, strict=False)) | dict(named)
    if len(given) != len(inputs) + len(named) or given.keys() != set(names):
        raise ExportError(
            f"{path}: takes {'; '.join(map(str, specs))}, but {len(inputs)} positional inputs and "
            f"the names {sorted(named)} were given"
        )
    sizes: dict[str, int] = {}
    for spec in specs:
        _check(path, spec, given[spec.name], sizes)
    return {name: given[name] for name in names}


def _flat(inputs: Sequence[Any], count: int) -> Sequence[Any]:
    """Lists the tensors of nested arguments, in the order in which the export named its inputs.

    Plain values are constants in the file. Where that does not come to `count` tensors, the
    arguments as they are.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(list(inputs)) if isinstance(leaf, Tensor)]
    return tensors if len(tensors) == count else inputs


def _check(path: Path, spec: TensorSpec, tensor: Tensor, sizes: dict[str, int]) -> None:
    """Checks a tensor. sizes: what each symbol stands for, filled as the inputs come."""
    if not isinstance(tensor, Tensor):
        raise ExportError(
            f"{path}: input {spec.name} is a {type(tensor).__name__}; pass a torch tensor"
        )
    if tensor.dtype != spec.dtype:
        raise ExportError(
            f"{path}: input {spec.name} is {text_of(tensor.dtype)}, but the file takes "
            f"{text_of(spec.dtype)}; convert it with .to(torch.{text_of(spec.dtype)})"
        )
    if not _fits(spec.shape, tuple(tensor.shape), sizes):
        raise ExportError(
            f"{path}: input {spec.name} has shape {text_of(tensor.shape)}, but the file takes "
            f"{text_of(spec.shape)}" + (f" with {sizes}" if sizes else "")
        )


def _fits(wanted: tuple[int | str, ...], given: tuple[int, ...], sizes: dict[str, int]) -> bool:
    if len(wanted) != len(given):
        return False
    for axis, size in zip(wanted, given, strict=True):
        fixed = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
        if fixed not in (size, -1):
            return False
    return True


@dataclass(frozen=True)
class Interface:
    """inputs, outputs: name, type and shape of each, as image: float32 (batch, 3, 64, 64)."""

    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, model: ir.Model) -> Interface:
        """Reads the interface of an ONNX model; opset 0 where it names none."""
        taken = [value for value in model.graph.inputs if not value.is_initializer()]
        return cls(
            model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0)),
            tuple(map(_said, taken)),
            tuple(map(_said, model.graph.outputs)),
        )


def _said(value: ir.Value) -> str:
    name = "UNDEFINED" if value.dtype is None else value.dtype.name
    shape = (axis or "?" for axis in axes_of(value))
    return f"{value.name}: {_TYPES.get(name, name.lower())} {text_of(shape)}"
