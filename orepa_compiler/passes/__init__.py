"""Runs passes one after the other, and defines the two pipelines of the verbs.

A pass first plans, touching nothing, and then applies its plan. Any object with these members is
one; add yours with Pipeline((MyPass(), *COLLAPSE.passes)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

from torch import nn

from orepa_compiler.algebra.classifiers import is_norm
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import Capture, capture
from orepa_compiler.capture.recording import Recording
from orepa_compiler.passes.adopt import Adopt
from orepa_compiler.passes.collapse import Collapse
from orepa_compiler.passes.cut import Cut
from orepa_compiler.passes.expand import Expand
from orepa_compiler.passes.linearize import Linearize
from orepa_compiler.passes.retracing import Retracing
from orepa_compiler.passes.squeeze import Squeeze
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.planning.overlaps import Touched, Touching, check_edits, touched_by
from orepa_compiler.rewriting.holding import hold_new, holdings_of
from orepa_compiler.rewriting.restoring import restoring

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
    """Passes, one after the other, each on a capture of what the one before left."""

    passes: tuple[Pass, ...]

    @property
    def modes(self) -> frozenset[bool]:
        """The modes that its passes capture a model in: True is train mode."""
        return frozenset(step.training for step in self.passes if step.training is not None)

    def configured(self, **options: Any) -> Pipeline:
        """The pipeline with these options: each pass that is a dataclass takes those it has."""
        return Pipeline(tuple(_with_options(step, options) for step in self.passes))

    def without(self, *names: str) -> Pipeline:
        """The pipeline without the passes of these names."""
        return Pipeline(tuple(step for step in self.passes if step.name not in names))

    def run(
        self,
        model: nn.Module,
        *,
        plan: Plan | None = None,
        recording: Recording | None = None,
        kept: Mapping[str, str] | None = None,
        restores: bool = True,
        retraces: bool = True,
        progress: Callable[[str], None] = lambda name: None,
    ) -> tuple[nn.Module, Plan]:
        """The rewritten model (in place) and the plan that was applied.

        plan: an earlier plan to apply again; None lets each pass make its own. recording: graphs
        for the forwards that cannot be traced. kept: module path -> why it stays as it is.
        restores: an error leaves the model as it was, which keeps what is replaced in memory until
        the end; False for a copy, which goes with the error. retraces: each rewrite is tried and
        traced again first; False where it is only asked what would be left.

        Raises ReparamError where a plan does not fit: a module of it is not there or has a hook, or
        two of its edits change the same.
        """
        with restoring(model) if restores else nullcontext():
            return self._run(model, plan, recording, kept or {}, progress, retraces)

    def _run(
        self,
        model: nn.Module,
        plan: Plan | None,
        recording: Recording | None,
        kept: Mapping[str, str],
        progress: Callable[[str], None],
        retraces: bool,
    ) -> tuple[nn.Module, Plan]:
        applied = Plan()
        known: Capture | None = None  # of the model as it is
        mode: bool | None = None
        for step in self.passes:
            progress(step.name)
            if known is None or mode != step.training:
                known = capture(model, training=step.training, is_leaf=is_leaf, recording=recording)
                mode = step.training
            captured = replace(known, kept={**known.kept, **kept})
            if plan is not None:
                wanted = plan.of(step.name)
            elif not retraces or isinstance(step, Adopt):  # which compares what it makes
                wanted = step.plan(captured)
            else:
                retracing = Retracing(is_leaf, recording or Recording())
                captured, wanted = retracing.planned(step, model, captured)
            wanted = _without_kept(step, captured, wanted)
            check_edits(captured, [(edit, touched_by(step, edit)) for edit in wanted.edits])
            holdings = holdings_of(model)
            model, done = step.apply(model, captured, wanted)
            hold_new(model, holdings)
            applied += done
            known = None if wanted.edits else known
        return model, _telling(applied, model, kept, self.passes)


def _telling(plan: Plan, model: nn.Module, kept: Mapping[str, str], passes: Any) -> Plan:
    """The plan with a refusal for each reason to keep something that no pass gave."""
    told = {refusal.reason for refusal in plan.refusals}
    modules = dict(model.named_modules(remove_duplicate=False))
    untold = [
        Refusal(passes[-1].name, path, type(modules.get(path)).__name__, reason)
        for path, reason in kept.items()
        if reason not in told
    ]
    return replace(plan, refusals=(*plan.refusals, *untold))


def _with_options(step: Pass, options: Mapping[str, Any]) -> Pass:
    if not is_dataclass(step) or isinstance(step, type):
        return step
    own = {field.name for field in fields(step) if field.init} - {"name", "training", "preserves"}
    taken = {name: value for name, value in options.items() if name in own}
    return replace(step, **taken)


def _without_kept(step: Pass, captured: Capture, plan: Plan) -> Plan:
    """The plan without the edits that touch what is kept, which are refusals instead.

    A pass that asks the capture plans none; one that does not, and an earlier plan, are held to it.
    """
    if not captured.kept:
        return plan
    edits, refusals = [], list(plan.refusals)
    for edit in plan.edits:
        kept = [path for path in _touched(step, edit) if path in captured.kept]
        if not kept:
            edits.append(edit)
        else:
            reason = captured.kept[kept[0]]
            refusals.append(Refusal(edit.done_by, edit.path, edit.before, reason))
    return Plan(tuple(edits), tuple(refusals), plan.checked)


def _touched(step: Pass, edit: Edit) -> tuple[str, ...]:
    return touched_by(step, edit).modules or (edit.path,)


def is_leaf(module: nn.Module) -> bool:
    """Modules whose own forward is of no interest: norms, blocks, and torch's own layers."""
    torch_layer = type(module).__module__.startswith("torch.nn.modules.")
    container = type(module).__module__ == "torch.nn.modules.container"
    return isinstance(module, ConvBlock) or is_norm(module) or (torch_layer and not container)


# What the verbs expand and collapse run, with their options.
EXPAND = Pipeline((Linearize(), Expand(), Squeeze()))
COLLAPSE = Pipeline((Adopt(), Collapse()))
