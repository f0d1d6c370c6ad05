"""The passes, and the two pipelines they make.

A pass first plans, touching nothing, and then applies its plan. Any object with these members is
one; add yours with Pipeline((MyPass(), *COLLAPSE.passes)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from orepa_compiler.algebra.layers import is_norm
from orepa_compiler.blocks import LinearBlock
from orepa_compiler.capture import Capture, capture
from orepa_compiler.capture.recording import Recording
from orepa_compiler.holding import hold_new, holdings_of
from orepa_compiler.overlaps import Touched, Touching, check_edits, touched_by
from orepa_compiler.passes.adopt import Adopt
from orepa_compiler.passes.collapse import Collapse
from orepa_compiler.passes.cut import Cut
from orepa_compiler.passes.expand import Expand
from orepa_compiler.passes.linearize import Linearize
from orepa_compiler.passes.retracing import Retracing
from orepa_compiler.passes.squeeze import Squeeze
from orepa_compiler.planning import Plan
from orepa_compiler.restoring import restoring

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
    "Touched",
    "Touching",
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
        restores: bool = True,
        progress: Callable[[str], None] = lambda name: None,
    ) -> tuple[nn.Module, Plan]:
        """The rewritten model (in place) and the plan that was applied.

        plan: an earlier plan to apply again; None lets each pass make its own. recording: graphs
        for the forwards that cannot be traced. kept: module path -> why it stays as it is.
        restores: an error leaves the model as it was, which keeps what is replaced in memory until
        the end; False for a copy, which goes with the error.

        Raises ReparamError where a plan does not fit: a module of it is not there or has a hook, or
        two of its edits change the same.
        """
        with restoring(model) if restores else nullcontext():
            return self._run(model, plan, recording, kept or {}, progress)

    def _run(
        self,
        model: nn.Module,
        plan: Plan | None,
        recording: Recording | None,
        kept: Mapping[str, str],
        progress: Callable[[str], None],
    ) -> tuple[nn.Module, Plan]:
        applied = Plan()
        for step in self.passes:
            progress(step.name)
            captured = capture(model, training=step.training, is_leaf=is_leaf, recording=recording)
            captured = replace(captured, kept={**captured.kept, **kept})
            if plan is not None:
                wanted = plan.of(step.name)
            elif isinstance(step, Adopt):  # which compares what it makes
                wanted = step.plan(captured)
            else:
                retracing = Retracing(is_leaf, recording or Recording())
                captured, wanted = retracing.planned(step, model, captured)
            check_edits(captured, [(edit, touched_by(step, edit)) for edit in wanted.edits])
            holdings = holdings_of(model)
            model, done = step.apply(model, captured, wanted)
            hold_new(model, holdings)
            applied += done
        return model, applied


def is_leaf(module: nn.Module) -> bool:
    """Modules whose own forward is of no interest: norms, blocks, and torch's own layers."""
    torch_layer = type(module).__module__.startswith("torch.nn.modules.")
    container = type(module).__module__ == "torch.nn.modules.container"
    return isinstance(module, LinearBlock) or is_norm(module) or (torch_layer and not container)


EXPAND = Pipeline((Linearize(), Expand(), Squeeze()))
COLLAPSE = Pipeline((Collapse(),))
