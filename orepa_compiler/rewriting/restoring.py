"""Puts a model back as it was when a rewrite fails in the middle."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from orepa_compiler.containers import members

_Contents = tuple[Any, Any]  # a dict, list or set, and a copy of what was in it


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Puts the model back as it was, where an exception ends the block.

    That is: its modules, parameters, buffers, attributes, hooks and modes, by identity, with lists,
    dicts and sets of the user's. Not the values in a tensor, so an edit makes new tensors and
    writes over none. What was replaced stays in memory until the block ends.
    """
    modules = [
        (module, type(module), vars(module), dict(vars(module))) for module in model.modules()
    ]
    contents: dict[int, _Contents] = {}
    for _, _, _, attributes in modules:
        for value in attributes.values():
            _remember(value, contents)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, before, attributes in modules:
            object.__setattr__(module, "__class__", kind)
            object.__setattr__(module, "__dict__", before)
            before.clear()
            before.update(attributes)
        for held, copied in contents.values():
            _put_back(held, copied)
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        raise


def _remember(value: Any, contents: dict[int, _Contents]) -> None:
    """Keeps what a container holds, and the containers in it."""
    held = members(value)
    if held is None or id(value) in contents:
        return
    contents[id(value)] = (value, list(value.items()) if isinstance(value, dict) else held)
    for inner in held:
        _remember(inner, contents)


def _put_back(held: Any, copied: list[Any]) -> None:
    """Gives a container back what it held, in the order it had."""
    if isinstance(held, (tuple, frozenset)):
        return
    held.clear()
    if isinstance(held, (list, deque)):
        held.extend(copied)
    else:
        held.update(copied)
