"""Finds the edits that made a model another function: those at the first module that differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orepa_compiler.capture import ancestors
from orepa_compiler.planning import Edit
from orepa_compiler.planning.overlaps import touched_modules
from orepa_compiler.validation.agreement import Disagreement, largest_error
from orepa_compiler.validation.behaviour import TrialCall, behaviour, flat
from orepa_compiler.verification.evaluation import Batch


def place_of(edit: Edit) -> str:
    """Where what an edit made stands, and is called."""
    return str(edit.options["owner"] if edit.options.get("kind") == "graph" else edit.path)


@dataclass(frozen=True)
class Suspicion:
    """Edits, and where the model differed first; what the numbers were there."""

    edits: tuple[Edit, ...]
    place: str
    error: float


@dataclass
class Watch:
    """The outputs of modules, in the order in which they finish: path and how often before."""

    paths: frozenset[str]
    seen: dict[tuple[str, int], dict[str, Any]]
    order: list[tuple[str, int]]


def outputs_by_module(
    model: nn.Module, batches: list[Batch], calls: list[TrialCall], dtype: torch.dtype | None
) -> Watch:
    """What each module gives in the last of the calls, in eval mode."""
    paths = frozenset(path for path, _ in model.named_modules(remove_duplicate=False))
    watch = Watch(paths, {}, [])
    counts: dict[str, int] = {}
    calling = [0]

    def after(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if calling[0] != len(calls):
                return
            key = (path, counts.get(path, 0))
            counts[path] = key[1] + 1
            watch.order.append(key)
            watch.seen[key] = flat(output)

        return keep

    def begins(*_: Any) -> None:
        calling[0] += 1

    with _hooked(model, after, begins):
        behaviour(model, batches, calls, dtype=dtype)
    return watch


@contextmanager
def _hooked(
    model: nn.Module, after: Callable[[str], Callable[..., None]], begins: Callable[..., None]
) -> Iterator[None]:
    handles = [model.register_forward_pre_hook(begins, prepend=True)]
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_hook(after(path), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def suspects(
    stock: Watch, made: Watch, edits: Iterable[Edit], *, tolerance: float
) -> Suspicion | None:
    """The edits at the first module whose output differs, among those that edits leave alone."""
    edits = list(edits)
    changed = {path for edit in edits for path in _unsettled(edit)}
    last_right = -1
    for position, key in enumerate(stock.order):
        path = key[0]
        if path in changed or path not in made.paths:
            continue
        found = made.seen.get(key)
        error = float("inf") if found is None else largest_error(stock.seen[key], found)[0]
        if error <= tolerance:
            last_right = position
            continue
        between = {name for name, _ in stock.order[last_right + 1 : position + 1]}
        blamed = tuple(e for e in edits if between.intersection(touched_modules(e)))
        return Suspicion(blamed, path, error)
    return None


def _unsettled(edit: Edit) -> Iterator[str]:
    """The modules whose own output an edit changes by intent: those it joins, and some around."""
    modules = edit.options.get("modules") or ()
    is_shifted = edit.options.get("bias_to") is not None
    if len(modules) < 2 and edit.options.get("kind") != "graph" and not is_shifted:
        return
    common = set.intersection(*(set(ancestors(path)) for path in modules)) if modules else set()
    for path in modules:
        yield path
        yield from set(ancestors(path)) - common


def blamed_edits(
    found: Disagreement, suspicion: Suspicion | None, edits: tuple[Edit, ...]
) -> tuple[tuple[Edit, ...], str]:
    """The edits that are to blame, as far as that is known, and what is said of them."""
    if suspicion is not None and suspicion.edits:
        where = suspicion.place or "the model's output"
        reason = (
            f"its rewrite did not agree with it on the inputs: {suspicion.error:.2g} at {where}"
        )
        return suspicion.edits, reason
    reason = f"its rewrite did not agree with it on the inputs: {found.text}"
    places = set(found.places)
    blamed = [
        edit
        for edit in edits
        if any(
            path == place or path.startswith(f"{place}.") or place.startswith(f"{path}.")
            for path in touched_modules(edit)
            for place in places
        )
    ]
    return tuple(blamed), reason


def narrowed(
    blamed: tuple[Edit, ...],
    edits: tuple[Edit, ...],
    agrees_with: Callable[[tuple[Edit, ...]], bool],
    may_go_on: Callable[[], bool],
) -> tuple[Edit, ...]:
    """Finds by halving one of the blamed edits that is wrong; one of all, where none of them is.

    Half of them are carried out alone: where that agrees, a wrong one is in the other half. A
    second one that is wrong is found by the next attempt. All that are blamed, where there is no
    time left to look.
    """
    suspected, is_sure = blamed, len(blamed) < 2
    while len(suspected) > 1:
        if not may_go_on():
            return blamed
        half = suspected[: len(suspected) // 2]
        is_sure = not agrees_with(half)
        suspected = half if is_sure else suspected[len(half) :]
    rest = tuple(edit for edit in edits if edit not in blamed)
    if is_sure or not rest or not agrees_with(suspected):
        return suspected
    return narrowed(rest, rest, agrees_with, may_go_on)


def kept_by(edits: tuple[Edit, ...], reason: str) -> dict[str, str]:
    """Module path -> why it stays as it is, for all that these edits touch."""
    return {path: reason for edit in edits for path in touched_modules(edit)}
