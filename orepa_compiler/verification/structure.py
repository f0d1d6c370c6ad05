"""Writes how the arguments of a call are nested as plain data beside their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from orepa_compiler.errors import ReparamError
from orepa_compiler.verification.nesting import kind_name


@dataclass(frozen=True)
class Structure:
    """One argument: a tensor by its name, a plain value, or a list, tuple or dict of such."""

    kind: Literal["tensor", "value", "list", "tuple", "dict"]
    name: str = ""
    value: bool | int | float | str | None = None
    keys: tuple[str | int, ...] = ()
    parts: tuple[Structure, ...] = ()


def taken_apart(batch: tuple[Any, ...]) -> tuple[dict[str, Tensor], list[Structure]]:
    """The tensors of a batch by name (0, 1, 2.image), and how each argument is made of them.

    Raises ReparamError for what is no plain data.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, [_structure(str(index), value, tensors) for index, value in enumerate(batch)]


def _structure(name: str, value: Any, tensors: dict[str, Tensor]) -> Structure:
    if isinstance(value, Tensor):
        tensors[name] = value
        return Structure("tensor", name)
    if value is None or type(value) in (bool, int, float, str):
        return Structure("value", value=value)
    if type(value) in (list, tuple):
        kind: Literal["list", "tuple"] = "list" if isinstance(value, list) else "tuple"
        parts = [_structure(f"{name}.{i}", part, tensors) for i, part in enumerate(value)]
        return Structure(kind, parts=tuple(parts))
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        parts = [_structure(f"{name}.{key}", part, tensors) for key, part in value.items()]
        return Structure("dict", keys=tuple(value), parts=tuple(parts))
    raise ReparamError(
        f"input {name} is a {kind_name(value)}: only tensors and plain values are kept as samples, "
        "so this export can be checked again beside its model only"
    )


def rebuilt(
    structures: list[Structure], tensors: Mapping[str, Tensor], *, what: str
) -> tuple[Any, ...]:
    """The batch that was taken apart. Raises ReparamError where a tensor is missing or left over.

    what: how a message begins.
    """
    used: set[str] = set()
    batch = tuple(_value(structure, tensors, used, what) for structure in structures)
    if left := sorted(set(tensors) - used):
        raise ReparamError(f"{what}: no argument holds the tensor {left[0]}; export again")
    return batch


def _value(structure: Structure, tensors: Mapping[str, Tensor], used: set[str], what: str) -> Any:
    if structure.kind == "tensor":
        if structure.name not in tensors:
            raise ReparamError(f"{what}: the input {structure.name!r} is missing; export again")
        used.add(structure.name)
        return tensors[structure.name]
    if structure.kind == "value":
        return structure.value
    parts = [_value(part, tensors, used, what) for part in structure.parts]
    if structure.kind == "dict":
        if len(parts) != len(structure.keys):
            raise ReparamError(
                f"{what}: a dict has {len(structure.keys)} keys, {len(parts)} values"
            )
        return dict(zip(structure.keys, parts, strict=True))
    return parts if structure.kind == "list" else tuple(parts)
