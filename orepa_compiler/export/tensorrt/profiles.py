"""Sets the shapes that an engine takes: smallest, tuned-for and largest of each input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orepa_compiler.errors import ExportError

Shape = tuple[int, ...]
# Smallest, tuned-for and largest shape: by input name, or alone where there is one input.
Shapes = Mapping[str, Sequence[Shape]] | Sequence[Shape]

# The batch sizes of an engine for a file with a symbolic batch: smallest, tuned for, largest.
MIN_BATCH, OPT_BATCH, MAX_BATCH = 1, 8, 32


def set_shapes(parsed: Any, config: Any, shapes: Shapes) -> None:
    """Adds the profile of shapes that the engine will take, where an input is symbolic.

    Raises ExportError for names that are no symbolic input, and for shapes that do not fit or do
    not contain each other.
    """
    network = parsed.network
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    symbolic = {value.name: tuple(value.shape) for value in inputs if -1 in tuple(value.shape)}
    named = _by_name(shapes, list(symbolic))
    unknown = named.keys() - symbolic.keys()
    if unknown:
        raise ExportError(
            f"shapes names {sorted(unknown)}, but the inputs with symbolic axes are "
            f"{sorted(symbolic) or 'none'}"
        )
    if not symbolic:
        return
    profile = parsed.builder.create_optimization_profile()
    for name, shape in symbolic.items():
        profile.set_shape(name, *shape_range(name, shape, named.get(name)))
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"TensorRT refuses the shapes {named} for {symbolic}")


def _by_name(shapes: Shapes, names: Sequence[str]) -> Mapping[str, Sequence[Shape]]:
    if isinstance(shapes, Mapping):
        return shapes
    if len(names) != 1:
        raise ExportError(
            f"shapes {list(shapes)} name no input, and the file has {len(names)} with symbolic "
            f"axes ({', '.join(names) or 'none'}); give them by name"
        )
    return {names[0]: shapes}


def shape_range(name: str, shape: Shape, given: Sequence[Shape] | None) -> list[Shape]:
    """Gives the smallest, tuned-for and largest shape of one input, whose symbolic axes are -1."""
    if given is None:
        if -1 in shape[1:]:
            raise ExportError(
                f"input {name} has symbolic axes beside the batch {shape}; pass shapes="
                f"{{{name!r}: (smallest, tuned-for, largest)}}"
            )
        return [(batch, *shape[1:]) for batch in (MIN_BATCH, OPT_BATCH, MAX_BATCH)]
    ranges = [tuple(entry) for entry in given]
    fits = len(ranges) == 3 and all(
        len(entry) == len(shape)
        and all(
            size == axis or (axis == -1 and size > 0)
            for size, axis in zip(entry, shape, strict=True)
        )
        for entry in ranges
    )
    if not fits or any(not low <= opt <= high for low, opt, high in zip(*ranges, strict=True)):
        raise ExportError(
            f"shapes of input {name} are {ranges}; pass three rising shapes that fit {shape}"
        )
    return ranges
