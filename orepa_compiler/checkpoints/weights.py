"""Weights from a file into a model: safetensors or torch.save, checked before they are copied."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.errors import CheckpointError

# Keys under which training scripts put the state_dict, in the order in which they are tried.
WRAPPERS = ("state_dict", "model_state_dict", "model")

# What DistributedDataParallel and torch.compile put in front of every key.
PREFIXES = ("module.", "_orig_mod.")

# The metadata key under which `save` keeps the plan beside the weights.
PLAN_KEY = "orepa"

# Each list of differing keys is cut after this many.
SHOWN_KEYS = 3


def load_weights(model: nn.Module, path: str | Path, *, allow_pickle: bool = False) -> None:
    """The weights of the file `path`, copied into `model`.

    Reads safetensors and torch.save files; takes a state_dict that stands under one of the keys
    `state_dict`, `model_state_dict` or `model`, and drops the prefix that DistributedDataParallel
    or torch.compile left on every key.
    allow_pickle: also read a pickle that runs code, such as a whole saved model. Only for a file
    that you trust.

    Raises CheckpointError when the file cannot be read, or when its keys or shapes differ from the
    model's; `model` is then as it was.
    """
    path = Path(path)
    state = _without_prefix(find_state(path, read_checkpoint(path, allow_pickle)), model)
    own = model.state_dict()
    wrong = [key for key in state if key in own and shape_of(state[key]) != shape_of(own[key])]
    # A trial on a copy lets the modules' own hooks rename keys, and leaves the model untouched.
    fitting = {key: value for key, value in state.items() if key not in wrong}
    result = value_copy(model).load_state_dict(fitting, strict=False)
    missing = [key for key in result.missing_keys if key not in wrong]
    if wrong or missing or result.unexpected_keys:
        shapes = [f"{key} {shape_of(state[key])} for {shape_of(own[key])}" for key in wrong]
        raise CheckpointError(
            f"{path}: does not fit {type(model).__name__} with its {len(own)} keys: "
            f"{first_few('missing', missing)}; {first_few('extra', result.unexpected_keys)}; "
            f"{first_few('of the wrong shape', shapes)}; {_remedy(result.unexpected_keys)}"
        )
    model.load_state_dict(state)


def has_plan(path: str | Path) -> bool:
    """Whether `save` wrote this file: a checkpoint with the plan that rebuilds the expanded model.

    Raises CheckpointError when the file cannot be read.
    """
    path = Path(path)
    with _reading(path):
        if not _is_safetensors(path):
            return False
        with safe_open(path, framework="pt") as file:
            return PLAN_KEY in (file.metadata() or {})


def read_checkpoint(
    path: Path, allow_pickle: bool, *, otherwise: str = ", or pass --allow-pickle if you trust it"
) -> Any:
    """What a safetensors file or a weights-only pickle holds.

    otherwise: what else the error about a pickle that runs code advises.
    Raises CheckpointError for any other file.
    """
    with _reading(path):
        if _is_safetensors(path):
            return load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            if named is None:
                raise
            raise CheckpointError(
                f"{path}: reading this pickle runs code (it names {named[1]}); save "
                f"model.state_dict() instead{otherwise}"
            ) from error


def _is_safetensors(path: Path) -> bool:
    # A safetensors file: the header's length in eight bytes, then the header, a JSON object.
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: a damaged safetensors file ({error})") from error
    except Exception as error:  # unpickling can raise anything
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise CheckpointError(
            f"{path}: neither safetensors nor a torch.save file ({type(error).__name__}: {reason})"
        ) from error


def find_state(path: Path, saved: Any) -> Mapping[str, Any]:
    """The mapping from keys to tensors inside what a file held."""
    if isinstance(saved, nn.Module):
        return saved.state_dict()
    if isinstance(saved, Mapping):
        for wrapper in WRAPPERS:
            if isinstance(saved.get(wrapper), (Mapping, nn.Module)):
                return find_state(path, saved[wrapper])
        if any(isinstance(value, Tensor) for value in saved.values()):
            return saved
        raise CheckpointError(
            f"{path}: holds no state_dict, neither itself nor under {', '.join(WRAPPERS)}; "
            f"{first_few('keys in it', [str(key) for key in saved])}"
        )
    raise CheckpointError(
        f"{path}: holds a {type(saved).__name__}, not a state_dict; save model.state_dict()"
    )


def _without_prefix(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    for prefix in PREFIXES:
        theirs = all(key.startswith(prefix) for key in state)
        if theirs and not all(key.startswith(prefix) for key in model.state_dict()):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _remedy(extra: Sequence[str]) -> str:
    if any("branches." in key for key in extra):
        return "it seems to be in training form: write it with orepa.save, which keeps the plan"
    return "name the model that this checkpoint was trained with"


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of a tensor; None for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def first_few(what: str, keys: Sequence[str]) -> str:
    """How many keys there are of a kind, and the first of them, for a message."""
    shown = ", ".join(keys[:SHOWN_KEYS])
    more = ", ..." if len(keys) > SHOWN_KEYS else ""
    return f"{len(keys)} {what}" + (f" ({shown}{more})" if keys else "")
