"""Reads the keys of a checkpoint of the authors' code, tells them apart and checks them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.checkpoints.reading import read_checkpoint
from orepa_compiler.checkpoints.states import PREFIXES, find_state, first_few, shape_of
from orepa_compiler.errors import CheckpointError
from orepa_compiler.reference.architectures import Architecture, Place
from orepa_compiler.reference.blocks import Kind, recognised
from orepa_compiler.reference.shapes import Shapes, conv_shape, norm_shapes

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Part:
    """One conv of the network with what the checkpoint holds for it, the place's name dropped."""

    place: Place
    kind: Kind
    tensors: Mapping[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """What its kernel was stored in."""
        return next(v.dtype for v in self.tensors.values() if v.is_floating_point())


def named_state(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a checkpoint for messages, and its state_dict without a wrapper's prefix.

    Raises CheckpointError when the file cannot be read, or holds no state_dict.
    """
    if isinstance(source, Mapping):
        path, saved = Path("the given checkpoint"), source
    else:
        path = Path(source)
        saved = read_checkpoint(path, allow_pickle=False, otherwise="")
    state = {str(key): value for key, value in find_state(path, saved, otherwise="").state.items()}
    for prefix in (*PREFIXES, *PREFIXES):  # one wrapper inside the other, either way
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return str(path), state


def kinds_in(state: Mapping[str, Any], places: tuple[Place, ...]) -> dict[str, Kind | None]:
    """The block that stands in each place; None where the checkpoint has none that is known."""
    return {place.name: recognised(_inside(state, place.name)) for place in places}


def checked(
    source: str,
    state: Mapping[str, Any],
    architecture: Architecture,
    stock: nn.Module,
    places: tuple[Place, ...],
) -> list[Part]:
    """The parts of the network, after a look at every key and shape.

    Raises CheckpointError with the missing and extra keys and those of another shape, counted.
    """
    kinds = kinds_in(state, places)
    expected: Shapes = {}
    for place in places:
        kind = kinds[place.name]
        if kind is not None:
            expected |= _expected(stock, place, kind)
    classifier = stock.get_submodule(architecture.classifier)
    expected |= {f"linear.{name}": tuple(p.shape) for name, p in classifier.named_parameters()}
    unknown = [f"{name}.*" for name, kind in kinds.items() if kind is None]
    # as everywhere in torch, a norm may lack the count of its batches: it starts at zero then
    missing = [key for key in expected if key not in state and not key.endswith(_COUNTER)]
    extra = [key for key in state if key not in expected]
    wrong = [
        f"{key} {shape_of(state[key])} for {shape}"
        for key, shape in expected.items()
        if key in state and shape_of(state[key]) != shape
    ]
    if unknown or missing or extra or wrong:
        raise CheckpointError(
            f"{source}: is no {architecture.name} of the authors' code, for which "
            f"{len(expected)} keys were looked up: {first_few('missing', unknown + missing)}; "
            f"{first_few('extra', extra)}; {first_few('of the wrong shape', wrong)}; "
            "name the architecture that it was trained as, with arch="
        )
    _check_averages(source, state, expected)
    return [
        Part(place, kind, _inside(state, place.name))
        for place in places
        if (kind := kinds[place.name]) is not None
    ]


def _check_averages(source: str, state: Mapping[str, Any], expected: Iterable[str]) -> None:
    """The filter that should be an average is one: our branch has no place for another."""
    for key in expected:
        if not key.endswith("avg_avg"):
            continue
        average, share = state[key], 1 / state[key].numel()
        tolerance = 4 * torch.finfo(average.dtype).eps * share
        if not bool(((average - share).abs() <= tolerance).all()):
            raise CheckpointError(
                f"{source}: {key} is no average: it has {float(average.min()):.4g} to "
                f"{float(average.max()):.4g} at its taps, {share:.4g} is due; the checkpoint is "
                "damaged, or not of the authors' code"
            )


def _expected(stock: nn.Module, place: Place, kind: Kind) -> Shapes:
    """The keys of a place, with their shapes."""
    conv = stock.get_submodule(place.conv)
    assert isinstance(conv, nn.Conv2d)
    shapes = kind.shapes(conv)
    if kind.has_explicit_branches:
        for theirs, ours in place.beside.items():
            module = stock.get_submodule(ours)
            if isinstance(module, nn.Conv2d):
                shapes[f"{theirs}.weight"] = conv_shape(module)
            else:
                shapes |= norm_shapes(theirs, conv.out_channels)
    return {f"{place.name}.{key}": shape for key, shape in shapes.items()}


def _inside(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    start = f"{name}."
    return {key.removeprefix(start): v for key, v in state.items() if key.startswith(start)}
