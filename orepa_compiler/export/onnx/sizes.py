"""Tries a model, what was traced of it, and its file at other heights and widths than the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.images import axis_names, is_image
from orepa_compiler.export.onnx.program import trace_program
from orepa_compiler.export.onnx.simplification import agree
from orepa_compiler.export.run.runners import OnnxRunner
from orepa_compiler.verification.nesting import named_leaves, tensors_in

Batch = tuple[Any, ...]
Size = tuple[int, ...]

# Other sizes than the traced one, the likeliest to run first: larger by what most nets divide by,
# and not alike in height and width; twice; half; and one that nothing divides.
_CHANGES: tuple[Callable[[Size], Size], ...] = (
    lambda size: tuple(axis + 32 * (index + 1) for index, axis in enumerate(size)),
    lambda size: tuple(2 * axis for axis in size),
    lambda size: tuple(max(1, axis // 2) for axis in size),
    lambda size: tuple(axis + 1 for axis in size),
)


def check_images(batch: Batch) -> None:
    """Raises ExportError where no input has a height and a width."""
    if not any(map(is_image, pytree.tree_leaves(batch))):
        shapes = [tuple(tensor.shape) for tensor in tensors_in(batch)]
        raise ExportError(
            f"dynamic_size: no input has a height and a width (their shapes are {shapes}); leave "
            "it out"
        )


def spatial_size(batch: Batch) -> Size:
    """Gives height and width (depth before them) of the first image."""
    first = next(leaf for leaf in pytree.tree_leaves(batch) if is_image(leaf))
    return tuple(first.shape[2:])


def resized(batch: Batch, change: Callable[[Size], Size]) -> Batch:
    """Gives the images of a batch another size, with the same values: tiled, or cut."""

    def image(leaf: Any) -> Any:
        if not is_image(leaf):
            return leaf
        for axis, size in enumerate(change(tuple(leaf.shape[2:])), start=2):
            leaf = leaf.index_select(axis, torch.arange(size) % leaf.shape[axis])
        return leaf

    resized: Batch = pytree.tree_map(image, batch)
    return resized


def other_sizes(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """Yields the batch at each other size that is tried and that the model runs on.

    Raises ExportError, with what the model says, where it runs on none.
    """
    said = ""
    for change in _CHANGES:
        other = resized(batch, change)
        try:
            with torch.no_grad():
                model(*other)
        except Exception as error:  # whatever the model's own forward raises
            said = said or f"at {spatial_size(other)} it raises {type(error).__name__}: {error}"
            continue
        said = "-"
        yield other
    if said != "-":
        raise ExportError(
            f"dynamic_size: the model takes no height and width but {spatial_size(batch)}: "
            f"{' '.join(said.split())}; leave it out"
        )


def check_traced(model: nn.Module, batch: Batch, *, dynamic_batch: bool) -> None:
    """Raises ExportError where what is traced at one size is not the model at others."""
    others = list(other_sizes(model, batch))  # what the model says of its size, before torch.export
    program = trace_program(model, batch, dynamic_batch=dynamic_batch, dynamic_size=True)
    _check_symbols(program)
    traced = program.module(check_guards=False)
    for other in others:
        with torch.no_grad():
            expected = named_leaves(model(*other))
            try:
                found = named_leaves(traced(*other))
            except Exception as error:  # whatever the traced operators raise
                raise ExportError(_differs(other, f"fails: {error}")) from error
        if name := _first_other(expected, found):
            raise ExportError(_differs(other, f"gives another {name}"))


def _check_symbols(program: ExportedProgram) -> None:
    inputs = {*program.graph_signature.user_inputs}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in inputs or not is_image(value):
            continue
        for axis, name in axis_names(value.dim()).items():
            if isinstance(value.shape[axis], int):
                raise ExportError(
                    f"dynamic_size: the model fixes the {name} of the input {node.name} at "
                    f"{value.shape[axis]}: its forward makes a plain number of it; leave it out"
                )


def _differs(other: Batch, what: str) -> str:
    return (
        f"dynamic_size: traced at one size, the model {' '.join(what.split())} at "
        f"{spatial_size(other)}: its forward decides by the height or width, or makes a plain "
        "number of it; leave it out"
    )


def _first_other(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Names the first output that is not the same up to rounding; "" where all are."""
    for (name, mine), other in zip(expected.items(), found.values(), strict=True):
        # A tensor of zeros or without values agrees with itself, and proves nothing.
        if not (torch.equal(mine, other) or agree(mine, other)):
            return name
    return ""


def check_other_sizes(path: Path, model: nn.Module, batch: Batch, *, precision: str) -> None:
    """Raises ExportError where the file, run in onnxruntime at another size, is not the model.

    Values are compared in float32; in other precisions the shapes are.
    """
    runner = OnnxRunner(path)
    other = next(other_sizes(model, batch))
    with torch.no_grad():
        expected = named_leaves(model(*other))
    types = [spec.dtype for spec in runner.inputs]
    tensors = [t.to(dtype) for t, dtype in zip(tensors_in(other), types, strict=True)]
    held = "an operator of the file holds the size it was traced at; leave it out"
    try:
        found = named_leaves(runner(*tensors))
    except ExportError as error:
        reason = error.reason.replace(f"{path}: ", "")
        said = f"the file does not run at {spatial_size(other)} ({reason}): {held}"
        raise ExportError(f"dynamic_size: {said}") from error
    for (name, mine), theirs in zip(expected.items(), found.values(), strict=True):
        is_same = torch.equal(mine, theirs) or agree(mine, theirs)
        if mine.shape != theirs.shape or (precision == "fp32" and not is_same):
            said = f"the file gives another {name} than the model at {spatial_size(other)}: {held}"
            raise ExportError(f"dynamic_size: {said}")
