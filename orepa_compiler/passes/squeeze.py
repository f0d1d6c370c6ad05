"""Squeeze: the sum of features becomes a sum of kernels (Hu et al. 2022, Sec. 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from orepa_compiler.blocks import LinearBlock, ReparamConv, squeezed
from orepa_compiler.capture import Capture
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import Edit, Plan
from orepa_compiler.rewriting.swapping import set_module_everywhere


@dataclass(frozen=True)
class Squeeze:
    """Every linear block runs as one conv whose kernel is made from its branches at each step.

    An offline block stays: its branches are not linear in train mode.
    """

    name: str = "squeeze"
    training: None = None
    preserves: frozenset[str] = frozenset({"train", "eval"})

    def plan(self, capture: Capture) -> Plan:
        blocks = [
            (path, module)
            for path, module in capture.skeleton.named_modules()
            if isinstance(module, LinearBlock) and not isinstance(module, ReparamConv)
        ]
        return Plan(tuple(self._edit(path, block) for path, block in blocks))

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        for edit in plan.edits:
            block = model.get_submodule(edit.path)
            if not isinstance(block, LinearBlock):
                raise ReparamError(
                    f"the plan does not fit: it squeezes a block, here is a {type(block).__name__}",
                    path=edit.path,
                )
            conv = squeezed(block)
            model = set_module_everywhere(model, capture.aliases[edit.path], conv)
        return model, plan

    def _edit(self, path: str, block: LinearBlock) -> Edit:
        parameters = sum(p.numel() for p in block.parameters())
        count = len(block.branches)
        return Edit(
            self.name, path, f"{count} branches on features", "one conv", (parameters, parameters)
        )
