"""Modules that a model also holds in plain lists, dicts and attributes, to run them from there.

A pyramid that keeps its convs registered by name, and in a list beside it, runs those of the list:
what is put in a registered place has to be put into the list too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from orepa_compiler.capture.effects.state import OWN
from orepa_compiler.containers import items, rebuilt

_DEEPEST = 4


@dataclass(frozen=True)
class Holding:
    """A place beside the registered ones that holds a module: `keys` inside an attribute."""

    owner: nn.Module
    attribute: str
    keys: tuple[Any, ...]
    path: str
    module: nn.Module


def holdings_of(model: nn.Module) -> list[Holding]:
    """The places beside `_modules` where a module holds one that is registered in the model."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for owner in model.modules():
        for attribute, value in vars(owner).items():
            if attribute in OWN:
                continue
            for keys, module in _modules_in(value):
                if id(module) in paths:
                    held = Holding(owner, attribute, keys, paths[id(module)], module)
                    found.append(held)
    return found


def hold_new(model: nn.Module, holdings: list[Holding]) -> None:
    """Puts into each place the module that is registered now where the one it holds was."""
    for held in holdings:
        try:
            module = model.get_submodule(held.path)
        except AttributeError:  # it went into another; whoever still runs it is found by a trace
            continue
        if module is not held.module:
            old = vars(held.owner)[held.attribute]
            vars(held.owner)[held.attribute] = _replaced(old, held.keys, module)


def _modules_in(value: Any, depth: int = 0) -> Iterator[tuple[tuple[Any, ...], nn.Module]]:
    if isinstance(value, nn.Module):
        yield (), value
    elif depth < _DEEPEST:
        for key, part in items(value) or ():
            for keys, module in _modules_in(part, depth + 1):
                yield (key, *keys), module


def _replaced(value: Any, keys: tuple[Any, ...], module: nn.Module) -> Any:
    """The value with a module in place; lists and dicts change, a tuple is made anew."""
    if not keys:
        return module
    key, *rest = keys
    part = _replaced(value[key], tuple(rest), module)
    if isinstance(value, tuple):
        return rebuilt(value, [part if i == key else old for i, old in enumerate(value)])
    value[key] = part
    return value
