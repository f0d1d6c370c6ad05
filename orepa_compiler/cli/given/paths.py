"""Checks the globs of `--where` against the convs that a plan found."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from orepa_compiler.blocks import ConvBlock
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import Plan
from orepa_compiler.rewriting.selection import matches_any


def check_where(patterns: Sequence[str], model: nn.Module, plan: Plan) -> None:
    """Raises ReparamError for a glob that matches none of the convs, so that a typo is seen."""
    found = [edit.path for edit in plan.edits] + [refusal.path for refusal in plan.refusals]
    paths = list(dict.fromkeys(found))
    blocks = [path for path, module in model.named_modules() if isinstance(module, ConvBlock)]
    # Of a block that was there before, the module around it can be named too.
    known = {*paths, *blocks, *(path.rpartition(".")[0] for path in blocks)}
    for pattern in patterns:
        if not matches_any(pattern, known):
            some = ", ".join(path or "(root)" for path in paths[:3])
            shown = f"{some}, ..." if len(paths) > 3 else some
            raise ReparamError(
                f"--where {pattern}: matches none of the {len(paths)} convs ({shown}); give a glob "
                "on their paths, such as 'layer1.*'"
                if paths
                else f"--where {pattern}: the model has no convs"
            )
