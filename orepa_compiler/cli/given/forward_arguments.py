"""Reads what a model's forward takes, and puts a batch of a data set in that order."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Batch = tuple[Any, ...]

_GATHERING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """The named arguments of a model's forward; none where it tells no signature."""
    try:
        found = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [parameter for parameter in found if parameter.kind not in _GATHERING]


def signature_text(model: nn.Module) -> str:
    """A forward's arguments for a message: (left, right, mask=...)."""
    names = [p.name if p.default is p.empty else f"{p.name}=..." for p in parameters_of(model)]
    return f"({', '.join(names)})"


def in_forward_order(entry: Any, model: nn.Module | None) -> Batch:
    """A batch of a data set as a model's positional arguments.

    A dict goes by name where the forward has those names, and else is the one argument. Of a tuple
    or list, what is left over behind the forward's arguments (labels, targets) is dropped.
    """
    if isinstance(entry, Mapping):
        by_name = bound(model, entry) if model is not None else None
        return by_name or (dict(entry),)
    if isinstance(entry, (tuple, list)):
        return _without_labels(tuple(entry), model)
    return (entry,)


def bound(model: nn.Module, named: Mapping[str, Any]) -> Batch | None:
    """Values by name in the order of the forward's arguments; None where the names are others.

    Names that the forward does not have (labels) are dropped, if it has all that it needs. An
    argument in between that is not given keeps its default.
    """
    parameters = parameters_of(model)
    needed = [p.name for p in parameters if p.default is p.empty]
    given = [p.name for p in parameters if p.name in named]
    if not given or not set(needed) <= set(given):
        return None
    last = max(index for index, p in enumerate(parameters) if p.name in named)
    return tuple(named.get(p.name, p.default) for p in parameters[: last + 1])


def _without_labels(entry: Batch, model: nn.Module | None) -> Batch:
    parameters = [] if model is None else parameters_of(model)
    needed = sum(p.default is p.empty for p in parameters) or 1
    kept = list(entry[: len(parameters)]) if parameters else list(entry)
    while len(kept) > needed and _are_labels(kept[-1], kept[0]):
        kept.pop()
    return tuple(kept)


def _are_labels(value: Any, first: Any) -> bool:
    """Whether these are class ids, one for each sample."""
    if not isinstance(value, Tensor) or not isinstance(first, Tensor):
        return False
    return value.ndim == 1 and not value.is_floating_point() and len(value) == len(first)
