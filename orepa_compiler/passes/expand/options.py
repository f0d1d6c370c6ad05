"""Defines the kinds of edits that expand makes, as types; in a plan they are plain JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from orepa_compiler.blocks import Scaling
from orepa_compiler.planning import Edit

Init = Literal["preserve", "paper"]
PostNorm = Literal["auto", "none"]


@dataclass(frozen=True)
class NewBlock:
    """A block in the place of a conv, by the names of it and of its branches.

    norm: whether a BatchNorm is inserted behind it. cost: how many times the MACs of the conv it
    takes in training; None where it is squeezed into one conv.
    """

    block: str
    branches: tuple[str, ...]
    scaling: Scaling
    norm: bool
    init: Init
    cost: float | None = None


@dataclass(frozen=True)
class MoreBranches:
    """Branches that a block gains, by the name of the block that it becomes."""

    block: str
    branches: tuple[str, ...]
    init: Init


Growth = NewBlock | MoreBranches


def growth_options(growth: Growth) -> dict[str, Any]:
    """A growth as the options of an Edit."""
    options = {name: value for name, value in asdict(growth).items() if value is not None}
    options["branches"] = list(growth.branches)
    return {"extends": True, **options} if isinstance(growth, MoreBranches) else options


def growth_of(edit: Edit) -> Growth:
    """The growth that an edit stands for. Raises ReparamError for one that expand did not write."""
    block, branches = str(edit.option("block")), tuple(edit.option("branches"))
    init = edit.option("init")
    if edit.options.get("extends"):
        return MoreBranches(block, branches, init)
    scaling, norm = edit.option("scaling"), bool(edit.option("norm"))
    return NewBlock(block, branches, scaling, norm, init, edit.options.get("cost"))
