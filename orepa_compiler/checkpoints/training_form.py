"""Reads the plain state_dict of an expanded model: its keys say which convs are blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from orepa_compiler.blocks import Block
from orepa_compiler.blocks.catalogue import BLOCKS
from orepa_compiler.checkpoints.states import FoundState, fitted
from orepa_compiler.checkpoints.weights import Loaded, misfit, put_into
from orepa_compiler.compiler import expand
from orepa_compiler.errors import CheckpointError, NothingExpandedWarning, ReparamError
from orepa_compiler.planning import recorded_plans

_BRANCHES = ".branches."


def is_training_form(state: Iterable[str], model: nn.Module) -> bool:
    """Whether the keys name branches of blocks that `model` does not have."""
    own = model.state_dict()
    return any(_BRANCHES in f".{key}" for key in state if key not in own)


def load_training_form(
    model: nn.Module,
    path: Path,
    found: FoundState,
    *,
    block: Block | Literal["auto"] | None = None,
) -> tuple[nn.Module, Loaded]:
    """Builds the expanded model with the keys and shapes of the file, and reads it in.

    block: which block the convs were expanded with; None tries each of the catalogue. `model` is
    not changed.
    Raises CheckpointError where none fits, and where the keys fit blocks that compute otherwise.
    """
    found = fitted(found, model.state_dict())
    where, names = _paths(found.state), _branch_names(found.state)
    known = [block for block in BLOCKS.values() if names <= {"origin", *block.branches}]
    tried: list[Block | str] = ["auto", *known] if block is None else [block]
    fits: dict[tuple[tuple[str, str], ...], nn.Module] = {}
    for candidate in tried:
        expanded = _expanded(model, candidate, where, found.state)
        if expanded is not None:
            fits.setdefault(_blocks(expanded), expanded)
    if not fits:
        what = "block" if len(where) == 1 else "blocks"
        raise CheckpointError(
            f"{path}: is in training form ({len(where)} {what}: {where[0]}), and no block "
            f"of {'the catalogue' if block is None else 'that name'} gives {type(model).__name__} "
            "these keys; save it with orepa.save, which keeps the plan"
        )
    if len(fits) > 1:
        names_of_blocks = sorted({after.split(",")[0] for made in fits for _, after in made})
        raise CheckpointError(
            f"{path}: its keys fit blocks that compute otherwise ({', '.join(names_of_blocks)}); "
            "say with --expanded NAME which it was"
        )
    (made, expanded), *_ = fits.items()
    loaded = put_into(expanded, path, found)
    said = sorted({after.split(",")[0] for _, after in made})
    return expanded, replace(loaded, block=" and ".join(said))


def _paths(state: Mapping[str, Any]) -> list[str]:
    """Lists the outermost modules with branches, in the file's order."""
    inside = (key.partition(_BRANCHES)[0] for key in state if _BRANCHES in key)
    return list(dict.fromkeys(inside))


def _branch_names(state: Mapping[str, Any]) -> set[str]:
    inside = (key.partition(_BRANCHES)[2] for key in state if _BRANCHES in key)
    return {key.partition(".")[0] for key in inside}


def _expanded(
    model: nn.Module, block: Block | str, where: list[str], state: Mapping[str, Any]
) -> nn.Module | None:
    for post_norm in ("auto", "none"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NothingExpandedWarning)
                made = expand(model, block=block, where=where, post_norm=post_norm)
        except ReparamError:
            return None
        if not misfit(made, state):
            return made
    return None


def _blocks(model: nn.Module) -> tuple[tuple[str, str], ...]:
    edits = (e for plan in recorded_plans(model) for e in plan.edits if e.done_by == "expand")
    return tuple((edit.path, edit.after) for edit in edits)
