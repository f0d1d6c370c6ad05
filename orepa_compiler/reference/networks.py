"""Builds the network of a checkpoint: our expanded model, or the stock one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from orepa_compiler.blocks import Block
from orepa_compiler.capture import capture
from orepa_compiler.errors import CheckpointError
from orepa_compiler.passes import Expand, Squeeze, is_leaf
from orepa_compiler.passes.expand.options import NewBlock, growth_of
from orepa_compiler.passes.expand.wording import describe_conv
from orepa_compiler.planning import Edit, Plan, Refusal, record_plan
from orepa_compiler.reference.composing import EPS, norm_of_tensors
from orepa_compiler.reference.keys import Part
from orepa_compiler.reference.parameters import Tensors


def expanded_network(stock: nn.Module, parts: Iterable[Part], classifier: Tensors) -> nn.Module:
    """The stock network with our blocks, the authors' parameters in the branches of their name.

    classifier: the state of its last layer.
    """
    state, blocks = dict(classifier), {}
    for part in parts:
        state |= _norms_of(part)
        path, kind, conv = part.place.conv, part.kind, _conv(stock, part)
        if kind.block is None or kind.parameters is None:
            state[f"{path}.weight"] = kind.operator(part.tensors, conv).weight.to(part.dtype)
            continue
        blocks[path] = kind.block
        own = kind.parameters(part.tensors, conv.groups)
        state |= {f"{path}.{name}": value for name, value in own.items()}
    return _filled(_with_blocks(stock, blocks), state).train()


def stock_network(stock: nn.Module, parts: Iterable[Part], classifier: Tensors) -> nn.Module:
    """The stock network with the authors' kernels, composed in float64 and cast once."""
    state = dict(classifier)
    for part in parts:
        place, kind = part.place, part.kind
        operator = kind.operator(part.tensors, _conv(stock, part))
        if place.norm is None and kind.norm is not None:
            operator = norm_of_tensors(part.tensors, kind.norm) @ operator
        operator = operator.to(part.dtype)
        state[f"{place.conv}.weight"] = operator.weight
        if operator.bias is None:
            state |= _norms_of(part)
        elif place.norm is None:
            state[f"{place.conv}.bias"] = operator.bias
        else:
            state |= _adding_norm(place.norm, operator.bias)
    return _filled(stock, state).eval()


def check_eps(source: str, stock: nn.Module, parts: Iterable[Part]) -> None:
    """A checkpoint does not hold the eps of its norms: the stock network must have the same."""
    for part in parts:
        for path in (part.place.norm, *part.place.beside.values()):
            eps = getattr(stock.get_submodule(path), "eps", EPS) if path else EPS
            if eps != EPS:
                raise CheckpointError(
                    f"{source}: {path} of the stock network has eps {eps}, the authors' norms have "
                    f"{EPS}; install a version of torchvision and timm where they agree"
                )


def _conv(stock: nn.Module, part: Part) -> nn.Conv2d:
    conv = stock.get_submodule(part.place.conv)
    assert isinstance(conv, nn.Conv2d)
    return conv


def _norms_of(part: Part) -> dict[str, Tensor]:
    """The norm behind the kernel, and what stands beside it, under the stock network's names."""
    moved = dict(part.place.beside) if part.kind.has_explicit_branches else {}
    if part.kind.norm is not None and part.place.norm is not None:
        moved[part.kind.norm] = part.place.norm
    return {
        f"{moved[module]}.{name}": value
        for key, value in part.tensors.items()
        for module, _, name in (key.rpartition("."),)
        if module in moved
    }


def _adding_norm(path: str, bias: Tensor) -> dict[str, Tensor]:
    """A norm that adds a bias and changes nothing else: 1 (y - 0) / sqrt((1 - eps) + eps) + b."""
    values = {
        "weight": torch.ones_like(bias),
        "bias": bias,
        "running_mean": torch.zeros_like(bias),
        "running_var": torch.ones_like(bias) - EPS,
        "num_batches_tracked": bias.new_zeros((), dtype=torch.long),
    }
    return {f"{path}.{name}": value for name, value in values.items()}


def _with_blocks(stock: nn.Module, blocks: Mapping[str, Block]) -> nn.Module:
    """The network with fresh blocks in these places, and the plan of it recorded."""
    captured = capture(stock, training=True, is_leaf=is_leaf)
    done = Plan()
    for block in {block.name: block for block in blocks.values()}.values():
        where = [path for path, own in blocks.items() if own is block]
        step = Expand(block=block, init="paper", where=where)
        edits = step.plan(captured).edits
        assert {edit.path for edit in edits} == set(where)
        assert not any(_inserts_norm(edit) for edit in edits)
        stock, applied = step.apply(stock, captured, Plan(edits))
        done += applied
    plain = [
        Refusal("expand", path, describe_conv(module), "plain in the authors' network")
        for path, module in captured.skeleton.named_modules()
        if isinstance(module, nn.Conv2d) and path not in blocks
    ]
    squeeze, blocks_only = Squeeze(), capture(stock, training=None, is_leaf=is_leaf)
    model, squeezed = squeeze.apply(stock, blocks_only, squeeze.plan(blocks_only))
    record_plan(model, done + Plan((), tuple(plain)) + squeezed)
    return model


def _inserts_norm(edit: Edit) -> bool:
    growth = growth_of(edit)
    return isinstance(growth, NewBlock) and growth.norm


def _filled(model: nn.Module, state: Tensors) -> nn.Module:
    """The network with these values, in memory of its own."""
    plain = torch.contiguous_format
    own = {key: value.detach().clone(memory_format=plain) for key, value in state.items()}
    model.load_state_dict(own, assign=True)
    return model
