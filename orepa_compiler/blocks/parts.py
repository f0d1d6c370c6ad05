"""Some branches of a block: their kernel, in a form that can be copied, cast and differentiated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from orepa_compiler.blocks import BranchSum
from orepa_compiler.generation.squeezing import squeeze


class PartOfBlock(nn.Module):
    """The named branches of a block, each behind its scaling layer; called, it gives their kernel.

    sum_m diag(v_m) W_m over the named branches, (C_out, C_in / groups, *K)
    """

    def __init__(self, block: BranchSum, names: Iterable[str]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: block.branches[name] for name in names})
        order = list(block.branches)
        self.scaling, self.rows = block.scaling, [order.index(name) for name in self.branches]

    def forward(self) -> Tensor:
        scaling = None if self.scaling is None else self.scaling[self.rows]
        return squeeze(self.branches.values(), scaling).weight  # type: ignore[arg-type]

    def pushed_forward(self, tangents: Mapping[str, Tensor]) -> Tensor:
        """Pushes a move of the parameters to the kernel (J m); those not named stand still."""
        values = {name: parameter.detach() for name, parameter in self.named_parameters()}
        moves = tuple(tangents.get(name, torch.zeros_like(p)) for name, p in values.items())

        def kernel(*given: Tensor) -> Tensor:
            named = dict(zip(values, given, strict=True))
            made: Tensor = functional_call(self, named, ())
            return made

        # by two backward passes: torch warns of its own code where forward mode is first used
        pushed: Tensor = torch.autograd.functional.jvp(kernel, tuple(values.values()), moves)[1]
        return pushed.detach()
