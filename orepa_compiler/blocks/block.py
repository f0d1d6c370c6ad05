"""Defines a block as a value: which branches stand in for a conv, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from orepa_compiler.algebra.operators import ConvOperator

BranchMaker = Callable[[ConvOperator], "nn.Module | None"]
Scaling = Literal["vector", "scalar", "none", "norm"]

# The block name of what linearize makes: the branches that were there, in linear form.
LINEARIZED = "LINEARIZED"


@dataclass(frozen=True)
class Block:
    """What a conv becomes in training: named branches, and what their scaling layers start from.

    branches: name -> function from the conv's operator to a branch module (None: not applicable).
    scaling: name -> initial scaling factor; 1 where a name is absent.
    scaling_layer: a vector per branch, one scalar per branch, or none (Hu et al. 2022, Table 3);
    or "norm": a BatchNorm behind each layer of each branch, on feature maps (Fig. 3, left). It
    starts as the identity, whatever `scaling` says.
    """

    name: str
    branches: Mapping[str, BranchMaker]
    scaling: Mapping[str, float]
    scaling_layer: Scaling = "vector"

    @property
    def is_offline(self) -> bool:
        """Whether its branches end in norms: no kernel can be made of them."""
        return self.scaling_layer == "norm"

    def make(self, conv: ConvOperator) -> dict[str, nn.Module]:
        """Fresh branches for a conv, those that apply."""
        made = {name: maker(conv) for name, maker in self.branches.items()}
        return {name: branch for name, branch in made.items() if branch is not None}
