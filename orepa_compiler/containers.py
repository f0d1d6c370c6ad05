"""Says what a container is, what it holds, and how one like it is made: every walk is built on it.

torch's own rule (torch.utils._pytree) is another: it asks for the very class, so that a list or a
dict of a class of the user's is a leaf to it, and so is every dataclass. Arguments and outputs that
models really have would hide their tensors from us.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx.immutable_collections import immutable_dict
from torch.nn import Parameter

_SEQUENCES = (list, tuple, deque)
# What most leaves are is known by the class alone: walks run at every function that is traced.
_LEAVES = {type(None), bool, int, float, str, Tensor, Parameter}


def items(value: Any) -> list[tuple[Any, Any]] | None:
    """Gives what a dict, list, tuple or deque holds, each with its key; None for anything else."""
    if type(value) in _LEAVES:
        return None
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, _SEQUENCES) else None


def members(value: Any) -> list[Any] | None:
    """Gives what a container of Python's holds, a set too; None for anything else."""
    if type(value) in _LEAVES:
        return None
    if isinstance(value, (set, frozenset)):
        return list(value)
    held = items(value)
    return None if held is None else [part for _, part in held]


def shown(value: Any) -> list[tuple[Any, Any]] | None:
    """Gives the items also of a mapping that is no dict, which its own code is asked for.

    For what goes into a call and comes out of it. What keeps state is looked at by its attributes:
    such code may do anything.
    """
    if type(value) in _LEAVES:
        return None
    held = items(value)
    return list(value.items()) if held is None and isinstance(value, Mapping) else held


def attributes(value: Any) -> list[tuple[str, Any]] | None:
    """Gives the attributes of an object, those in slots too; None where it can have none."""
    slots = [name for cls in type(value).__mro__ for name in slots_of(cls)]
    if not slots and not hasattr(value, "__dict__"):
        return None
    own = [*getattr(value, "__dict__", {}).items()]
    return own + [(name, getattr(value, name)) for name in slots if hasattr(value, name)]


def slots_of(cls: type) -> tuple[str, ...]:
    """Names the attributes that a class of the user's keeps in slots."""
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def is_named_tuple(value: Any) -> bool:
    """Whether a value is a tuple whose places have names."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def rebuilt(value: Any, parts: Sequence[Any]) -> Any:
    """Makes a container like this one, with other parts in the order of its items."""
    if isinstance(value, Mapping):
        return _rebuilt_mapping(value, parts)
    if is_named_tuple(value):
        return type(value)(*parts)
    if isinstance(value, deque):
        return type(value)(parts, value.maxlen)
    return type(value)(parts)


def _rebuilt_mapping(value: Mapping[Any, Any], parts: Sequence[Any]) -> Any:
    named = dict(zip(value, parts, strict=True))
    if type(value) in (dict, immutable_dict):  # fx freezes what stands in a graph
        return named
    if not isinstance(value, MutableMapping):
        return value  # nobody but its class can make another
    made = copy.copy(value)  # with its attributes: a default, an order, the fields of an output
    for key, part in named.items():
        made[key] = part
    return made


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Makes a nested value again, with every leaf (whatever is no container) changed."""
    held = shown(value)
    if held is None:
        return change(value)
    return rebuilt(value, [mapped(part, change) for _, part in held])
