"""Adds branches up: on feature maps, or as the one conv that they are together."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks.block import Block
from orepa_compiler.branches import Geometry
from orepa_compiler.errors import NotLinear
from orepa_compiler.generation import generate
from orepa_compiler.generation.store import KernelStore

BranchesOf = Callable[[ConvOperator, Block], dict[str, nn.Module]]


def linear_branches(conv: ConvOperator, block: Block) -> dict[str, nn.Module]:
    """Makes the branches of a block for a conv. Raises NotLinear where they normalize."""
    if block.is_offline:
        raise NotLinear(
            f"the branches of block {block.name} end in norms, so no kernel can be made of "
            "them; use replace(block, scaling_layer='vector')"
        )
    return block.make(conv)


class BranchSum(Geometry):
    """Parallel branches, each ending in its scaling layer: a branch itself, so blocks nest.

    make: gives the branches of a block for a conv.
    """

    scaling: nn.Parameter | None

    def __init__(
        self, conv: ConvOperator, block: Block, make: BranchesOf = linear_branches
    ) -> None:
        super().__init__(conv)
        branches = make(conv, block)
        self.block_name, self.scaling_layer = block.name, block.scaling_layer
        self.branches = nn.ModuleDict(branches)
        columns = {"vector": conv.out_channels, "scalar": 1}.get(block.scaling_layer, 0)
        if columns:
            factors = conv.weight.new_tensor([block.scaling.get(name, 1.0) for name in branches])
            self.scaling = nn.Parameter(factors.unsqueeze(1).repeat(1, columns))
        else:
            self.register_parameter("scaling", None)

    def operator(self) -> ConvOperator:
        """The branches squeezed into one operator (Hu et al. 2022, Eq. 3 and 4)."""
        return generate(self)

    def branch_operators(self) -> dict[str, ConvOperator]:
        """Each branch behind its scaling layer, by name: what the plots of Fig. 7 compare."""
        operators = {
            name: branch.operator()  # type: ignore[operator]
            for name, branch in self.branches.items()
        }
        if self.scaling is None:
            return operators
        scaled = zip(operators.items(), self.scaling, strict=True)
        return {name: operator.scale(v) for (name, operator), v in scaled}

    def forward(self, input: Tensor) -> Tensor:
        """The branches on feature maps, scaled and added."""
        outputs = [branch(input) for branch in self.branches.values()]
        if self.scaling is not None:
            shape = (1, -1, *(1,) * len(self.kernel_size))
            outputs = [v.reshape(shape) * y for v, y in zip(self.scaling, outputs, strict=True)]
        return reduce(torch.add, outputs)


class SqueezedSum(BranchSum):
    """Parallel branches as one conv: what a sum of branches is inside an offline block."""

    def __init__(self, branches: BranchSum) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(branches.__dict__)
        self.store = KernelStore()

    def forward(self, input: Tensor) -> Tensor:
        return self.store.operator(self)(input)
