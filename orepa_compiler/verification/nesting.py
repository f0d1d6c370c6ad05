"""Finds the tensors in nested arguments and outputs, and names them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from orepa_compiler.containers import is_named_tuple, mapped, shown
from orepa_compiler.errors import ReparamError

Form = Literal["tensor", "sequence", "fields", "mapping"]


def named_leaves(value: Any) -> dict[str, Any]:
    """What a call returned, leaf by leaf: tensors, and whatever else it holds.

    The names are those of an exported file: `output` for a lone tensor, output_0, output_1, ... for
    a list or tuple, the keys of a dict, the fields of a namedtuple or dataclass, what torch.export
    was told of a class; deeper levels are joined with a dot. None is no leaf; a plain number is a
    tensor without axes.

    Raises ReparamError when two leaves have one name.
    """
    found: dict[str, Any] = {}
    for path, leaf in _walk(value, ()):
        start = "output_" if path and isinstance(path[0], int) else ""
        name = start + ".".join(map(str, path)) if path else "output"
        if name in found:
            raise ReparamError(f"two outputs are called {name}; rename one of the keys")
        found[name] = leaf
    return found


def leaf_paths(value: Any) -> tuple[tuple[Any, ...], ...]:
    """Where the leaves of named_leaves lie in the value, in the same order."""
    return tuple(path for path, _ in _walk(value, ()))


def form_of(value: Any) -> Form:
    """How a call returned its outputs: namedtuples and dataclasses have fields."""
    if _fields(value):
        return "fields"
    if isinstance(value, Mapping):
        return "mapping"
    return "sequence" if isinstance(value, (list, tuple)) else "tensor"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a nested value."""
    return (leaf for _, leaf in _walk(value, ()) if isinstance(leaf, Tensor))


def others_in(value: Any) -> Iterator[Any]:
    """What a nested value holds that is neither a tensor nor a plain number nor None."""
    return (leaf for _, leaf in _walk(value, ()) if not isinstance(leaf, Tensor))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Makes the same nested value with every tensor changed, wherever tensors_in finds it."""

    def changed(part: Any) -> Any:
        if isinstance(part, Tensor):
            return change(part)
        if isinstance(part, nn.Module):  # a list of a model's may hold one
            return part
        if fields := _fields(part):
            made = copy.copy(part)
            for name in fields:  # also of a frozen dataclass
                object.__setattr__(made, name, map_tensors(getattr(part, name), change))
            return made
        if pytree.tree_is_leaf(part):
            return part
        return pytree.tree_map(
            lambda child: map_tensors(child, change), part, is_leaf=lambda child: child is not part
        )

    return mapped(value, changed)


def is_comparable(leaf: Any) -> bool:
    """Whether `leaf` is a tensor with plain values: strided, not quantized."""
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_quantized


def is_smooth(leaf: Any) -> bool:
    """Whether rounding moves a value a little, and does not turn it into another."""
    return is_comparable(leaf) and (leaf.is_floating_point() or leaf.is_complex())


def is_finite(value: Any) -> bool:
    """Whether no tensor in a nested value holds NaN or inf."""
    return not any(nonfinite_counts(leaf) for leaf in tensors_in(value) if is_comparable(leaf))


def nonfinite_counts(tensor: Tensor) -> dict[str, int]:
    """How often `tensor` holds NaN, and inf of either sign; empty where it holds neither."""
    values = tensor.double() if tensor.is_floating_point() else tensor  # float8 has no isnan
    counts = {"NaN": int(values.isnan().sum()), "inf": int(values.isinf().sum())}
    return {word: count for word, count in counts.items() if count}


def describe_argument(argument: Any) -> str:
    """An argument as a message shows it: (2, 3, 64, 64) float32."""
    if isinstance(argument, Tensor):
        return f"{tuple(argument.shape)} {str(argument.dtype).removeprefix('torch.')}"
    return repr(argument) if isinstance(argument, (int, float, str)) else kind_name(argument)


def kind_name(value: Any) -> str:
    """The name of a value's type: list, numpy.ndarray."""
    name, module = type(value).__qualname__, type(value).__module__
    return name if module == "builtins" else f"{module}.{name}"


def _walk(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if value is None:
        return
    parts = shown(value)
    if (fields := _fields(value)) and not isinstance(value, Mapping):
        parts = [(name, getattr(value, name)) for name in fields]
    elif parts is None and pytree.tree_is_leaf(value):
        yield path, _as_tensor(value)
        return
    elif parts is None:
        parts = registered_children(value)
    for key, part in parts:
        yield from _walk(part, (*path, key))


def registered_children(value: Any) -> list[tuple[Any, Any]]:
    """What a container holds, as its class is registered with torch.export: each with its key.

    A class may be registered without keys. Those of a mapping, or the attributes, are taken then,
    where they hold the children; else numbers.
    """

    def is_child(part: Any) -> bool:
        return part is not value

    try:
        keyed, _ = pytree.tree_flatten_with_path(value, is_leaf=is_child)
        return [(_key_of(path[0]), child) for path, child in keyed]
    except ValueError:
        children = pytree.tree_leaves(value, is_leaf=is_child)
    named = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    names = {id(child): name for name, child in named.items()}
    if len({id(child) for child in children} & names.keys()) < len(children):
        return list(enumerate(children))
    return [(names[id(child)], child) for child in children]


def _key_of(entry: Any) -> Any:
    fields = ("key", "idx", "name")
    return next((getattr(entry, field) for field in fields if hasattr(entry, field)), entry)


def _as_tensor(leaf: Any) -> Any:
    if isinstance(leaf, float):
        return torch.tensor(leaf, dtype=torch.float64)
    return torch.tensor(leaf) if isinstance(leaf, (bool, int)) else leaf


def _fields(value: Any) -> tuple[str, ...]:
    if is_named_tuple(value):
        return tuple(value._fields)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(field.name for field in dataclasses.fields(value))
    return ()
