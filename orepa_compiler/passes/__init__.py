"""The passes, and the two pipelines they make.

A pass first plans, touching nothing, and then applies its plan. Any object with these members is
one; add yours with Pipeline((MyPass(), *COLLAPSE.passes)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from orepa_compiler.algebra.layers import is_norm
from orepa_compiler.blocks import LinearBlock
from orepa_compiler.capture import Capture, capture
from orepa_compiler.capture.recording import Recording
from orepa_compiler.errors import ReparamError
from orepa_compiler.holding import hold_new, holdings_of
from orepa_compiler.passes.adopt import Adopt
from orepa_compiler.passes.collapse import Collapse
from orepa_compiler.passes.cut import Cut
from orepa_compiler.passes.expand import Expand
from orepa_compiler.passes.linearize import Linearize
from orepa_compiler.passes.retracing import Retracing
from orepa_compiler.passes.squeeze import Squeeze
from orepa_compiler.planning import Plan

__all__ = [
    "COLLAPSE",
    "EXPAND",
    "Adopt",
    "Collapse",
    "Cut",
    "Expand",
    "Linearize",
    "Pass",
    "Pipeline",
    "Squeeze",
]


class Pass(Protocol):
    """One rewrite of a model.

    preserves: the modes ("train", "eval") in which outputs stay the same. training: the mode whose
    graphs it plans on; None where it looks at no graph.
    """

    @property
    def name(self) -> str: ...
    @property
    def training(self) -> bool | None: ...
    @property
    def preserves(self) -> frozenset[str]: ...
    def plan(self, capture: Capture) -> Plan:
        """What would be done; touches nothing."""
        ...

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        """The rewritten model, and the plan with what was learned while applying it."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """Passes, one after the other, each on a fresh capture of what the one before left."""

    passes: tuple[Pass, ...]

    def run(
        self,
        model: nn.Module,
        *,
        plan: Plan | None = None,
        recording: Recording | None = None,
        kept: Mapping[str, str] | None = None,
        progress: Callable[[str], None] = lambda name: None,
    ) -> tuple[nn.Module, Plan]:
        """The rewritten model (in place) and the plan that was applied.

        plan: an earlier plan to apply again; None lets each pass make its own. recording: graphs
        for the forwards that cannot be traced. kept: module path -> why it stays as it is.
        """
        applied = Plan()
        for step in self.passes:
            progress(step.name)
            captured = capture(model, training=step.training, is_leaf=is_leaf, recording=recording)
            captured = replace(captured, kept={**captured.kept, **(kept or {})})
            if plan is not None:
                wanted = plan.of(step.name)
            elif isinstance(step, Adopt):  # which compares what it makes
                wanted = step.plan(captured)
            else:
                retracing = Retracing(is_leaf, recording or Recording())
                captured, wanted = retracing.planned(step, model, captured)
            _check_fit(captured, wanted)
            holdings = holdings_of(model)
            model, done = step.apply(model, captured, wanted)
            hold_new(model, holdings)
            applied += done
        return model, applied


def _check_fit(captured: Capture, plan: Plan) -> None:
    for edit in plan.edits:
        if edit.path not in captured.aliases:
            raise ReparamError(
                "the plan does not fit: the model has no such module", path=edit.path
            )


def is_leaf(module: nn.Module) -> bool:
    """Modules whose own forward is of no interest: norms, blocks, and torch's own layers."""
    torch_layer = type(module).__module__.startswith("torch.nn.modules.")
    container = type(module).__module__ == "torch.nn.modules.container"
    return isinstance(module, LinearBlock) or is_norm(module) or (torch_layer and not container)


EXPAND = Pipeline((Linearize(), Expand(), Squeeze()))
COLLAPSE = Pipeline((Collapse(),))
