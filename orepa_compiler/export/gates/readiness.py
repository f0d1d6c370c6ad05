"""Checks a model and its inputs before anything is exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from orepa_compiler.blocks import ConvBlock
from orepa_compiler.errors import ExportError
from orepa_compiler.planning import Edit, Plan, Refusal, recorded_plans

Inputs = Tensor | tuple[Any, ...] | Sequence[Any]


def first_batch(inputs: Inputs) -> tuple[Any, ...]:
    """Takes the positional arguments of the first batch in `inputs`.

    inputs: a tensor, a tuple of positional arguments, or a list of such batches.
    """
    batch = inputs[0] if isinstance(inputs, list) and inputs else inputs
    arguments = (batch,) if isinstance(batch, Tensor) else batch
    leaves = pytree.tree_leaves(arguments)
    if not isinstance(arguments, tuple) or not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ExportError(
            f"inputs hold no batch to trace with ({type(inputs).__name__}); pass a tensor, a tuple "
            "of positional arguments, or a list of such batches"
        )
    return arguments


def check_ready(model: nn.Module) -> None:
    """Raises ExportError for a model whose exported form would not be what was trained."""
    if not isinstance(model, nn.Module):
        raise ExportError(f"a {type(model).__name__} cannot be exported; pass an nn.Module")
    if model.training:
        raise ExportError("the model is in train mode; call model.eval() first")
    blocks = [path for path, module in model.named_modules() if isinstance(module, ConvBlock)]
    if blocks:
        raise ExportError(
            f"still in training form ({len(blocks)} such blocks); call orepa.collapse(model) first",
            path=blocks[0],
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ExportError(
                "on the meta device, without values; load its weights first", path=name
            )


def norm_left_reason(model: nn.Module, norm: str, count: int) -> str:
    """Words what to do about a norm after a conv: to collapse, or why the collapse left it."""
    what = f"a BatchNorm straight after a conv ({count} of them)"
    plans = [p for p in recorded_plans(model) if any(e.done_by == "collapse" for e in _told(p))]
    if not plans:
        return f"{what}; call orepa.collapse(model) first"
    reasons = [told.reason for told in plans[-1].refusals if told.path == norm]
    why = f": {reasons[-1]}" if reasons else ""
    return (
        f"{what}, which orepa.collapse left{why}; change what the reason names, or give the "
        "collapse inputs=, and collapse the model again (orepa.recorded_plans(model)[-1] has all)"
    )


def _told(plan: Plan) -> tuple[Edit | Refusal, ...]:
    return (*plan.edits, *plan.refusals)
