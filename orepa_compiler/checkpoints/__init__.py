"""Checkpoints that know how their model was made: safetensors, with the plans in the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orepa_compiler.blocks import Block
from orepa_compiler.capture.skeleton import is_sharded, value_copy
from orepa_compiler.checkpoints.parts import inside, planned_parts, replayed, wrapper_of
from orepa_compiler.checkpoints.reading import PLAN_KEY, has_plan
from orepa_compiler.checkpoints.weights import load_weights
from orepa_compiler.errors import CheckpointError, ReparamError
from orepa_compiler.files.atomic import staged
from orepa_compiler.files.schemas import read_json
from orepa_compiler.planning import Plan

# A file of a model of which a part was made, or that is wrapped, has the second format.
_FORMATS = (1, 2)

# What a plan of another model, or a spoilt one, makes the passes raise.
_UNFIT = (ReparamError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class _About:
    """What stands beside the weights.

    plans: of the model, each as its own JSON. parts: module path -> the plans that made it.
    """

    format: int
    plans: list[str]
    parts: dict[str, list[str]] = field(default_factory=dict)


def save(model: nn.Module, path: str | Path) -> Path:
    """Writes a checkpoint of the model's weights and the plans that made its form.

        orepa.save(model, "epoch90.safetensors")

    The file is safetensors, readable by anything that reads them. It is written beside its place
    and renamed, so a killed process leaves the old file whole. A sharded model (fully_shard) is
    gathered: every process calls save, and the first one writes. The plans may be those of parts: a
    detector's backbone, what an EMA or DDP holds.

    Raises CheckpointError for a model without values, for a plain one that DDP or torch.compile
    wraps, and where no plan tells how a block was made; ExportError when the path cannot be
    written, or the disk is full.
    """
    path = Path(path)
    plans = {part: [plan.to_json() for plan in made] for part, made in planned_parts(model).items()}
    state = model.state_dict()
    for prefix in ("module.", "_orig_mod."):
        if not plans and state and all(key.startswith(prefix) for key in state):
            raise CheckpointError(
                f"every key begins with {prefix!r}: save the model inside the wrapper, "
                f"model.{prefix[:-1]}"
            )
    if any(is_sharded(value) for value in state.values()):
        state = {k: t.full_tensor() if is_sharded(t) else t for k, t in state.items()}
        if torch.distributed.get_rank() > 0:
            return path
    about = _About(1, plans.pop("", []), plans)
    about = replace(about, format=2) if plans else about
    with staged(path) as temporary:
        save_file(_separate(state), temporary, {PLAN_KEY: json.dumps(asdict(about))})
    return path


def load(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    path: str | Path,
    *,
    block: Block | Literal["auto"] = "auto",
) -> nn.Module:
    """Loads the model of a checkpoint that save wrote, in the form it was saved in.

        model = orepa.load(torchvision.models.resnet18, "epoch90.safetensors")

    model_or_factory: the stock model, or a function that builds it; its own weights do not matter
    and it is not changed. Of a file of a wrapper (EMA, AveragedModel, DDP, a LightningModule) also
    the model inside: the rest of the file is then left out. block: the user's own Block, if the
    plan names one.

    Raises CheckpointError when the file is not such a checkpoint, or belongs to another model:
    the message counts the missing and the extra keys and names the first ones.
    """
    path = Path(path)
    stock = _stock(model_or_factory)
    if not has_plan(path):
        raise CheckpointError(
            f"{path}: holds no plan, so it was not written by orepa.save; "
            "load it with model.load_state_dict"
        )
    parts = _plans(path)
    wrapper = wrapper_of(stock, parts)
    if wrapper is None:
        raise CheckpointError(
            f"{path}: its plan does not fit {type(stock).__name__}: the parts that were rewritten "
            f"are {', '.join(part or '(root)' for part in parts)}; name the model that was saved"
        )
    inner = {inside(part, wrapper) or "": made for part, made in parts.items()}
    is_plain = not wrapper and len(parts) == 1
    read = {} if is_plain else load_file(path)
    state = {k: tensor for key, tensor in read.items() if (k := inside(key, wrapper)) is not None}
    try:
        model = replayed(stock, inner, set(state), block)
    except _UNFIT as error:
        raise CheckpointError(
            f"{path}: its plan does not fit {type(stock).__name__} ({error}); "
            "name the model that this checkpoint was trained with"
        ) from error
    if not wrapper:
        load_weights(model, path)
        return model
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: what is at {wrapper} does not fit: {error}") from error
    return model


def _stock(model_or_factory: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if isinstance(model_or_factory, nn.Module):
        return value_copy(model_or_factory)
    model = model_or_factory()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"the factory gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _plans(path: Path) -> dict[str, list[Plan]]:
    """Reads the plans of the file, by the path of the module they made; the model's own at ""."""
    with safe_open(path, framework="pt") as file:
        text = file.metadata()[PLAN_KEY]
    about = read_json(text, _About, what=f"{path}: its plan", error=CheckpointError)
    if about.format not in _FORMATS:
        raise CheckpointError(
            f"{path}: has checkpoint format {about.format}, this version reads "
            f"{' and '.join(map(str, _FORMATS))}"
        )
    own = {"": about.plans} if about.plans or not about.parts else {}
    try:
        return {
            part: [Plan.from_json(plan) for plan in plans]
            for part, plans in {**own, **about.parts}.items()
        }
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies the tensors as safetensors takes them: contiguous, none sharing memory."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{key} is a {type(value).__name__}, and safetensors holds only tensors; "
                "drop it from the state_dict"
            )
        if value.is_meta:
            raise CheckpointError(f"{key} is on the meta device: there are no values to save")
        value = value.detach().contiguous()
        pointer = value.untyped_storage().data_ptr()
        separate[key] = value.clone() if pointer in seen or _is_view(value) else value
        seen.add(pointer)
    return separate


def _is_view(value: Tensor) -> bool:
    return value.untyped_storage().nbytes() != value.numel() * value.element_size()
