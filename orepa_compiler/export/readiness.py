"""What must be right with a model and its inputs before anything is exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from orepa_compiler.blocks import LinearBlock
from orepa_compiler.errors import ExportError

Inputs = Tensor | tuple[Any, ...] | Sequence[Any]


def first_batch(inputs: Inputs) -> tuple[Any, ...]:
    """The positional arguments of the first batch in `inputs`.

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
    blocks = [path for path, module in model.named_modules() if isinstance(module, LinearBlock)]
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
