"""Collapse: blocks, branches and norms become plain convs.

Operators are read and composed in float64 and cast once. Norms are always folded; two convs are
joined only where that costs no more MACs. The running statistics are used, whatever mode the model
is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from torch import nn

from orepa_compiler.analysis.regions import Interpreter
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import Capture
from orepa_compiler.passes.collapse.candidates import find_candidates, is_inside
from orepa_compiler.passes.collapse.concatenation import concatenated_convs
from orepa_compiler.passes.collapse.edits import (
    absorption_edit,
    block_edit,
    concatenation_edit,
    region_edit,
)
from orepa_compiler.passes.collapse.folding import absorb_norm, fold_block, fold_regions
from orepa_compiler.passes.collapse.folds import FoldBlock, FoldRegion, fold_of
from orepa_compiler.passes.collapse.refusals import kept_apart, left_norms, read_away
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.planning.overlaps import Touched


@dataclass(frozen=True)
class Collapse:
    """Folds every linear region into one conv; with fold_norm=False only blocks, norms stay."""

    fold_norm: bool = True
    name: str = "collapse"
    training: bool = False
    preserves: frozenset[str] = frozenset({"eval"})

    def plan(self, capture: Capture) -> Plan:
        interpreter = Interpreter(capture, capture.module)
        edits = self._norm_edits(interpreter) if self.fold_norm else []
        taken = _taken(edits)
        refusals: list[Refusal] = []
        for path, module in capture.skeleton.named_modules():
            if not isinstance(module, ConvBlock) or is_inside(path, taken):
                continue
            if reason := capture.hook_refusal(path):
                refusals.append(Refusal(self.name, path, f"block {module.block_name}", reason))
            else:
                edits.append(block_edit(self.name, capture, path, module, self.fold_norm))
        if self.fold_norm:
            folds = [fold_of(edit) for edit in edits]
            taken |= set(read_away(capture, interpreter, folds))
            refusals += left_norms(self.name, capture, interpreter, taken)
            refusals += kept_apart(self.name, capture, interpreter, folds, taken)
        return Plan(tuple(edits), tuple(refusals))

    def _norm_edits(self, interpreter: Interpreter) -> list[Edit]:
        """The edits for regions, and for norms that go into convs which are no operators."""
        capture, name = interpreter.capture, self.name
        found = find_candidates(interpreter)
        edits = [region_edit(name, capture, region) for region in found.regions]
        edits += [absorption_edit(name, capture, *pair) for pair in found.absorbed]
        taken = _taken(edits)
        return edits + [
            concatenation_edit(name, capture, convs, norm)
            for convs, norm in concatenated_convs(capture)
            if not any(is_inside(path, taken) for path in (*convs, norm))
        ]

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        found, known = [fold_of(edit) for edit in plan.edits], Interpreter(capture, capture.module)
        model = model.eval()  # its own, as the capture shows it: some keep a norm in batch mode
        for owner, group in groupby(found, key=_owner):
            folds = list(group)
            if owner is not None:
                regions = [fold for fold in folds if isinstance(fold, FoldRegion)]
                model = fold_regions(model, known, owner, regions)
                continue
            for fold in folds:
                if isinstance(fold, FoldBlock):
                    model = fold_block(model, capture, fold)
                elif not isinstance(fold, FoldRegion):
                    model = absorb_norm(model, fold)
        return model.eval(), plan

    def touched(self, edit: Edit) -> Touched:
        fold = fold_of(edit)
        nodes = fold.nodes if isinstance(fold, FoldRegion) else ()
        return Touched(fold.modules, _owner(fold), nodes)


def _owner(fold: object) -> str | None:
    """The module whose forward holds a region; None for a fold that is none."""
    return fold.owner if isinstance(fold, FoldRegion) else None


def _taken(edits: list[Edit]) -> set[str]:
    return {path for edit in edits for path in fold_of(edit).modules}
