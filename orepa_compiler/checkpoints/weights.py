"""Weights from a file into a model: safetensors or torch.save, checked before they are copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.checkpoints.reading import read_checkpoint
from orepa_compiler.checkpoints.states import (
    AVERAGES,
    FoundState,
    Weights,
    find_state,
    first_few,
    fitted,
    shape_of,
)
from orepa_compiler.errors import CheckpointError


@dataclass(frozen=True)
class Loaded:
    """What went from a file into a model.

    keys: how many tensors. under: the key of the file that they stood under. prefix: what was
    dropped in front of every name. cast: from and to which type, where the two differ. block: what
    the blocks are, where the file holds an expanded model without its plan.
    """

    keys: int
    under: str = ""
    prefix: str = ""
    cast: str = ""
    block: str = ""

    def __str__(self) -> str:
        parts = [f"{self.keys} tensors"]
        if self.under:
            parts[0] += f" from {self.under}"
        if self.under.partition(".")[0] in AVERAGES:
            parts[0] += " (the running average)"
        parts += [f"prefix {self.prefix!r} dropped"] if self.prefix else []
        parts += [self.cast] if self.cast else []
        parts += [f"training form, {self.block} blocks"] if self.block else []
        return ", ".join(parts)


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    allow_pickle: bool = False,
    weights: Weights | None = None,
) -> Loaded:
    """Copies the weights of the file `path` into `model`, and says what was copied.

    Reads safetensors and torch.save files; takes the state_dict that stands under a key such as
    `state_dict`, `model_state_dict` or `model`, or the running average (`state_dict_ema`, ...), and
    drops a prefix that stands before every key (`module.`, `model.`, `_orig_mod.`).
    allow_pickle: also read a pickle that runs code, such as a whole saved model. Only for a file
    that you trust. weights: which of the two, where the file holds both.

    Raises CheckpointError when the file cannot be read, when it holds two different sets and
    `weights` says nothing, or when its keys or shapes differ from the model's; `model` is then as
    it was.
    """
    path = Path(path)
    found = find_state(path, read_checkpoint(path, allow_pickle), weights)
    return put_into(model, path, found)


def put_into(model: nn.Module, path: Path, found: FoundState) -> Loaded:
    """Copies a state_dict that was found in a file into `model` if every key and shape fits."""
    own = model.state_dict()
    found = fitted(found, own)
    if whole := [key for key, value in own.items() if _is_whole(found.state.get(key), value)]:
        raise CheckpointError(
            f"{path}: {first_few('whole numbers', whole)} where the model has fractions; give the "
            "weights before they were quantized"
        )
    if message := misfit(model, found.state):
        raise CheckpointError(f"{path}: {message}; {_remedy(found.state, own)}")
    model.load_state_dict(found.state)
    return Loaded(len(found.state), found.under, found.prefix, _cast(found.state, own))


def _is_whole(given: Any, own: Any) -> bool:
    tensors = isinstance(given, Tensor) and isinstance(own, Tensor)
    return tensors and own.is_floating_point() and not given.is_floating_point()


def misfit(model: nn.Module, state: Mapping[str, Any]) -> str:
    """Counts the keys and shapes that keep a state_dict out of a model; "" where it fits."""
    own = model.state_dict()
    wrong = [key for key in state if key in own and shape_of(state[key]) != shape_of(own[key])]
    # A trial on a copy lets the modules' own hooks rename keys, and leaves the model untouched.
    fitting = {key: value for key, value in state.items() if key not in wrong}
    result = value_copy(model).load_state_dict(fitting, strict=False)
    missing = [key for key in result.missing_keys if key not in wrong]
    if not (wrong or missing or result.unexpected_keys):
        return ""
    shapes = [f"{key} {shape_of(state[key])} for {shape_of(own[key])}" for key in wrong]
    return (
        f"does not fit {type(model).__name__} with its {len(own)} keys: "
        f"{first_few('missing', missing)}; {first_few('extra', result.unexpected_keys)}; "
        f"{first_few('of the wrong shape', shapes)}"
    )


def _remedy(state: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    extra = [key for key in state if key not in own]
    if any("branches." in key for key in extra):
        return "it seems to be in training form: write it with orepa.save, which keeps the plan"
    heads = [key for key in state if key in own and shape_of(state[key]) != shape_of(own[key])]
    if heads and not extra and all(key.endswith((".weight", ".bias")) for key in heads):
        rows = {shape_of(state[key])[0] for key in heads if shape_of(state[key])}  # type: ignore[index]
        if len(rows) == 1 and len(heads) <= 2:
            return f"for another number of classes, give --num-classes {rows.pop()}"
    return "name the model that this checkpoint was trained with"


def _cast(state: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Says where copying changes the type: what the file holds is then not what runs."""

    def types(values: Mapping[str, Any]) -> list[torch.dtype]:
        found = (v.dtype for v in values.values() if shape_of(v) and v.is_floating_point())
        return sorted(set(found), key=str)

    theirs, ours = types({key: state[key] for key in state if key in own}), types(own)
    if not theirs or theirs == ours:
        return ""
    names = [" and ".join(str(t).removeprefix("torch.") for t in side) for side in (theirs, ours)]
    return f"{names[0]} read as {names[1]}"
