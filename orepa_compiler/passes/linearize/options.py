"""Defines the kinds of edits that linearize makes, as types; in a plan they are plain JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orepa_compiler.planning import Edit


@dataclass(frozen=True)
class LinearizeSum:
    """A sum in a forward: its nodes by name, in order, and the node that all branches read."""

    nodes: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class LinearizeBlock:
    """A block of ours whose branches normalize. norm_follows: whether a norm stands behind it."""

    norm_follows: bool


def change_options(change: LinearizeSum | LinearizeBlock) -> dict[str, Any]:
    """A change as the options of an Edit."""
    if isinstance(change, LinearizeSum):
        return {"nodes": list(change.nodes), "source": change.source}
    return {"norm_follows": change.norm_follows}


def change_of(edit: Edit) -> LinearizeSum | LinearizeBlock:
    """The change that an edit stands for; ReparamError for one that linearize did not write."""
    if "norm_follows" in edit.options:
        return LinearizeBlock(bool(edit.options["norm_follows"]))
    return LinearizeSum(tuple(edit.option("nodes")), str(edit.option("source")))
