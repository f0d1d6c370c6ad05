"""Checkpoints of the method authors' public code, into our expanded model or the stock network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from orepa_compiler.errors import CheckpointError, ReparamError
from orepa_compiler.progress import announced
from orepa_compiler.reference.architectures import Architecture, architecture_named
from orepa_compiler.reference.blocks import Kind
from orepa_compiler.reference.keys import Part, checked, kinds_in, named_state
from orepa_compiler.reference.networks import check_eps, expanded_network, stock_network

Form = Literal["expanded", "stock"]

_EXPAND = "load it with form='stock', and give it branches with orepa.expand"


def load_reference(
    path: str | Path | Mapping[str, Any], arch: str, *, form: Form = "expanded"
) -> nn.Module:
    """Builds the network of a checkpoint that the authors' code (Hu et al. 2022) wrote.

        model = orepa.load_reference("OREPA-R18.pth", "ResNet-18")

    path: a torch.save or safetensors file, or a dict that was read from one: a state_dict, alone or
    beside an optimizer's, with or without the prefix `module.`. arch: ResNet-18, -34, -50, -101,
    ResNet-18-1.5x, -2x, ResNeXt-50, RepVGG-A0, -A1 or -A2.
    form: "expanded" is torchvision's or timm's network in training form, in train mode, the
    authors' parameters one for one in the branches of our blocks; orepa.save takes it. "stock" is
    that network without blocks, in eval mode: kernels composed in float64 and cast once, norms
    kept. Where the checkpoint has folded its norms (its deploy form), or keeps one in each branch
    (DBB), a stock norm only adds the bias: that network is for inference. A RepVGG without explicit
    branches goes to timm's own deploy form. torchvision has no wide ResNet-18: for orepa.load, the
    stock form is the model to rebuild.

    Nothing is unpickled. Raises CheckpointError for a file that cannot be read, for keys or shapes
    that are not the architecture's, and for form="expanded" where there are no branches to go on
    with; MissingPackage without torchvision or timm; ReparamError for another arch or form.
    """
    if form not in ("expanded", "stock"):
        raise ReparamError(f"form={form!r} is neither 'expanded' nor 'stock'")
    architecture = architecture_named(arch)
    source, state = named_state(path)
    with announced(f"{architecture.name}, {form}") as step:
        step(f"{len(state)} tensors of {source}")
        return network_of(source, state, architecture, form=form)


@torch.no_grad()
def network_of(
    source: str, state: Mapping[str, Any], architecture: Architecture, *, form: Form
) -> nn.Module:
    """The network of a state_dict; `source` names it in messages."""
    stock = _without_values(architecture.build)
    places = tuple(architecture.places(stock))
    kinds = kinds_in(state, places)
    _check_forms(source, kinds, architecture)
    has_explicit = any(kind is not None and kind.has_explicit_branches for kind in kinds.values())
    if architecture.build_collapsed is not None and not has_explicit:
        stock = _without_values(architecture.build_collapsed)
        places = tuple(architecture.places(stock))
    parts = checked(source, state, architecture, stock, places)
    check_eps(source, stock, parts)
    own = {f"{architecture.classifier}.{n}": state[f"linear.{n}"] for n in ("weight", "bias")}
    if form == "stock":
        return stock_network(stock, parts, own)
    _check_branches(source, parts, architecture)
    return expanded_network(stock, parts, own)


def _check_forms(source: str, kinds: Mapping[str, Kind | None], architecture: Architecture) -> None:
    """RepVGG blocks stand in a RepVGG, and then everywhere."""
    known = {name: kind for name, kind in kinds.items() if kind is not None}
    explicit = [name for name, kind in known.items() if kind.marker.startswith("rbr_")]
    if explicit and architecture.build_collapsed is None:
        raise CheckpointError(
            f"{source}: {explicit[0]} is a RepVGG block, behind which the authors' code always "
            f"puts a ReLU, also where {architecture.name} has none: this is another network, and "
            "only their code runs it"
        )
    training = [name for name, kind in known.items() if kind.has_explicit_branches]
    others = [name for name in known if name not in training]
    if training and others:
        raise CheckpointError(
            f"{source}: {training[0]} is {known[training[0]].name} and {others[0]} is "
            f"{known[others[0]].name}, two forms in one network; convert all of it"
        )


def _check_branches(source: str, parts: Sequence[Part], architecture: Architecture) -> None:
    """There are branches to go on with."""
    for part in parts:
        if part.kind.lost:
            raise CheckpointError(
                f"{source}: {part.place.name} is {part.kind.name}: {part.kind.lost}; "
                "load it with form='stock', for inference"
            )
    if all(part.kind.block is None for part in parts):
        raise CheckpointError(
            f"{source}: has plain convs and no branches of an OREPA block; {_EXPAND}"
        )
    if parts[0].place.norm is None:
        raise CheckpointError(
            f"{source}: {parts[0].place.name} is {parts[0].kind.name} and its block has no other "
            f"branch, as no {architecture.name} of timm has in training form; {_EXPAND}"
        )


def _without_values(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()
