"""Counts what a model's convs cost: multiply-accumulates for one image."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.classifiers import is_conv_like
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture.skeleton import meta_copy, value_copy
from orepa_compiler.errors import ReparamError
from orepa_compiler.verification.evaluation import batches_of, evaluation_mode
from orepa_compiler.verification.nesting import map_tensors


def conv_macs(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Path of each conv or block -> its multiply-accumulates for one image, as `conv_costs`."""
    return conv_costs(model, inputs)[0]


def conv_costs(model: nn.Module, inputs: Any) -> tuple[dict[str, int], int]:
    """Path of each conv or block -> its MACs for one image of `inputs`; and the images in a batch.

    MACs = kernel elements x output positions, summed over the calls. Counted on a copy without
    values, so it costs no arithmetic; a forward that asks for values (a detector's) runs once. The
    user's hooks are not called, but where the forward does not run without them.
    Raises ReparamError where the model does not run on the inputs.
    """
    batch = batches_of(inputs)[0]
    empty = map_tensors(batch, lambda tensor: tensor.to("meta"))
    try:
        return _counted(meta_copy(model), empty)
    except Exception:  # a forward is the user's code: anything may come out of it
        pass
    try:
        return _counted(value_copy(model), map_tensors(batch, Tensor.clone))
    except Exception:
        pass
    try:  # a forward may read what a hook leaves
        return _counted(value_copy(model), map_tensors(batch, Tensor.clone), with_hooks=True)
    except Exception as error:
        raise ReparamError(
            f"MACs cannot be counted: the model does not run on the inputs "
            f"({type(error).__name__}: {error})"
        ) from error


@torch.no_grad()
def _counted(
    model: nn.Module, batch: tuple[Any, ...], *, with_hooks: bool = False
) -> tuple[dict[str, int], int]:
    counts: dict[str, int] = defaultdict(int)
    images: list[int] = []
    for path, module in model.named_modules():
        if not with_hooks:  # the user's hooks are for real calls
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        if is_conv_like(module) or isinstance(module, ConvBlock):
            module.register_forward_hook(_counter(counts, images, path))
    with evaluation_mode(model):
        model(*batch)
    return dict(counts), min(images, default=1)


def _counter(counts: dict[str, int], images: list[int], path: str) -> Any:
    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # a transposed conv spends its kernel on each input position
        places = args[0] if getattr(module, "transposed", False) else output
        is_batch = places.dim() == weight.dim()
        spatial = places.shape[2:] if is_batch else places.shape[1:]
        images.append(places.shape[0] if is_batch else 1)
        counts[path] += weight.numel() * spatial.numel()

    return count
