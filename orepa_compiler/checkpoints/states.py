"""Picks the state_dict in what a file held, and strips the prefix before its names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.checkpoints.reading import runs_code, stands_for
from orepa_compiler.choices import Weights as Weights
from orepa_compiler.errors import CheckpointError

# Keys under which training scripts put the state_dict, in the order in which they are tried.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "params")

# Keys under which they put the running average of the weights.
AVERAGES = (
    *("state_dict_ema", "model_ema_state_dict", "ema_state_dict", "model_ema", "ema_model"),
    *("ema", "params_ema"),
)

# What DistributedDataParallel and torch.compile put in front of every key.
PREFIXES = ("module.", "_orig_mod.")

# The count that torch's AveragedModel keeps beside the model.
_NOT_OF_THE_MODEL = ("n_averaged",)

# Each list of differing keys is cut after this many.
SHOWN_KEYS = 3


@dataclass(frozen=True)
class FoundState:
    """A state_dict, and how it was found. under: the key it stood under; "" for the file itself."""

    state: Mapping[str, Any]
    under: str = ""
    prefix: str = ""


def find_state(
    path: Path,
    saved: Any,
    weights: Weights | None = None,
    *,
    otherwise: str = ", or pass --allow-pickle if you trust it",
) -> FoundState:
    """Finds the mapping from keys to tensors inside what a file held.

    weights: the model's own, or their running average. Raises CheckpointError where the file has
    both, they differ and none was chosen; where it has not the one that was; and for no mapping.
    """
    if isinstance(saved, nn.Module):
        return FoundState(saved.state_dict())
    if named := stands_for(saved):
        raise runs_code(path, named, otherwise)
    if not isinstance(saved, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(saved).__name__}, not a state_dict; save model.state_dict()"
        )
    plain, average = _first(saved, WRAPPERS), _first(saved, AVERAGES)
    if weights == "ema" and average is None:
        raise CheckpointError(
            f"{path}: --weights ema: it holds no average of the weights, under none of "
            f"{', '.join(AVERAGES)}"
        )
    if plain and average and weights is None and _differ(saved[plain], saved[average]):
        raise CheckpointError(
            f"{path}: holds the weights as trained ({plain}) and their running average "
            f"({average}); say which: --weights model or --weights ema"
        )
    key = average if weights == "ema" or plain is None else plain
    if key is not None:
        inner = find_state(path, saved[key], None, otherwise=otherwise)
        return FoundState(inner.state, f"{key}.{inner.under}" if inner.under else key)
    if any(isinstance(value, Tensor) for value in saved.values()):
        return FoundState(saved)
    raise CheckpointError(
        f"{path}: holds no state_dict, neither itself nor under {', '.join(WRAPPERS)}; "
        f"{first_few('keys in it', [str(key) for key in saved])}"
    )


def _first(saved: Mapping[Any, Any], keys: Iterable[str]) -> str | None:
    return next((key for key in keys if isinstance(saved.get(key), (Mapping, nn.Module))), None)


def _differ(left: Any, right: Any) -> bool:
    """Whether two sets of weights are other numbers, whatever prefix their keys have."""
    first, second = (
        [value for value in _plain(state).values() if isinstance(value, Tensor)]
        for state in (left, right)
    )
    first, second = ([t for t in side if t.is_floating_point()] for side in (first, second))
    return len(first) != len(second) or not all(map(torch.equal, first, second))


def _plain(state: Any) -> Mapping[str, Any]:
    return state.state_dict() if isinstance(state, nn.Module) else state


def fitted(found: FoundState, own: Iterable[str]) -> FoundState:
    """Gives the state_dict the model's own names: a prefix before all of its keys is dropped.

    own: the model's keys. A prefix is one or several whole parts of a path (`module.`, `model.`,
    `_orig_mod.module.`), and is dropped only where that makes keys fit.
    """
    names, best = set(own), found
    state = {k: v for k, v in found.state.items() if k not in _NOT_OF_THE_MODEL or k in names}
    prefix = ""
    while (part := _shared_part(state)) is not None:
        state = {key.removeprefix(part): value for key, value in state.items()}
        prefix += part
        fit, best_fit = len(names & state.keys()), len(names & best.state.keys())
        # Hooks may rename keys later, so the prefixes of wrappers go without any key that fits.
        is_wrapper = part in PREFIXES and not all(name.startswith(part) for name in names)
        if fit > best_fit or (is_wrapper and fit == best_fit):
            best = FoundState(state, found.under, prefix)
    return best


def _shared_part(state: Mapping[str, Any]) -> str | None:
    """Finds the first part of every key, with its dot, where they all begin with the same."""
    first = {key.partition(".")[0] if "." in key else None for key in state}
    part = first.pop() if len(first) == 1 else None
    return None if part is None else f"{part}."


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Gives the shape of a tensor; None for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def first_few(what: str, keys: Sequence[str]) -> str:
    """Counts the keys of a kind and names the first of them, for a message."""
    shown = ", ".join(keys[:SHOWN_KEYS])
    more = ", ..." if len(keys) > SHOWN_KEYS else ""
    return f"{len(keys)} {what}" + (f" ({shown}{more})" if keys else "")
