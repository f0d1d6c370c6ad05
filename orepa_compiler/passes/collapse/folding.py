"""Folding: the edits of collapse are made, each operator in float64 and cast once."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from orepa_compiler.algebra.layers import linear_part
from orepa_compiler.analysis.regions import Interpreter
from orepa_compiler.analysis.values import LinearValue
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.plain import like, plain_conv
from orepa_compiler.capture import Capture, ancestors
from orepa_compiler.capture.forwards import Read
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.passes.collapse.absorption import absorb
from orepa_compiler.passes.collapse.bias import give_bias
from orepa_compiler.passes.collapse.folds import (
    AbsorbNorm,
    FoldBlock,
    FoldConcatenation,
    FoldPath,
    FoldRegion,
)
from orepa_compiler.passes.collapse.identities import identity_for
from orepa_compiler.passes.collapse.norms_before import after_norm
from orepa_compiler.passes.collapse.norms_behind import with_norm
from orepa_compiler.rewriting.swapping import (
    METHODS,
    exchange,
    free_name,
    replace_regions,
    set_module,
    set_module_everywhere,
)


def fold_regions(
    model: nn.Module, known: Interpreter, owner: str, folds: Sequence[FoldRegion]
) -> nn.Module:
    """Folds all regions of one owner: first the paths, whose children are swapped, then its graph.

    known: what hangs on no values, of the forwards of the capture.
    """
    read, capture = _in_float64(model), known.capture
    replacements = []
    for fold in folds:
        interpreter = known.reading(read)  # anew, for the fold before changed the model
        value = _value(interpreter, fold)
        modules = [model.get_submodule(path) for path in fold.modules]
        direct = own_parameters(model.get_submodule(owner), value)
        replaced = [*(p for module in modules for p in module.parameters()), *direct]
        assert value.operator is not None
        conv = like(value.operator.to_module(), replaced)
        for norm in filter(None, (fold.before, fold.behind)):
            model = set_module(model, norm, _rest(model, norm) or _identity(model, norm))
        if isinstance(fold, FoldPath):
            model = _fold_path(model, fold, conv)
        else:
            replacements.append((fold, conv, value))
    return _fold_graph(model, capture, owner, replacements) if replacements else model


def _value(interpreter: Interpreter, fold: FoldRegion) -> LinearValue:
    """What a region computes, with the norms in other modules."""
    chain = fold.layers if isinstance(fold, FoldPath) else []
    value = interpreter.value_of(fold.owner, fold.nodes, chain)
    if fold.before:
        value = after_norm(value, fold.before, interpreter.read)
    return with_norm(value, fold.behind, interpreter.read) if fold.behind else value


def _fold_graph(
    model: nn.Module,
    capture: Capture,
    owner: str,
    replacements: Sequence[tuple[FoldRegion, nn.Module, LinearValue]],
) -> nn.Module:
    """The model with regions of the owner's forward replaced by one conv each."""
    module = model.get_submodule(owner)
    graph = capture.own_graph(owner, module)
    name = free_name(module, "reparam_conv")
    parts = []
    for number, (fold, conv, value) in enumerate(replacements, 1):
        rest = _rest(model, fold.modules[-1]) if value.rest is not None else None
        child = conv if rest is None else nn.Sequential(conv, rest)
        label = name if number == 1 else f"{name}_{number}"
        parts.append((fold.nodes, fold.source, label, child))
    return exchange(model, module, replace_regions(module, graph, parts))


def absorb_norm(model: nn.Module, fold: AbsorbNorm | FoldConcatenation) -> nn.Module:
    """Folds a norm into one conv, or into the convs whose concatenation it reads."""
    *paths, norm = fold.modules
    read = _in_float64(model)
    affine, rest = linear_part(read(norm))
    assert affine.bias is not None
    convs = [_own_class(read(path), path) for path in paths]
    widths = [int(conv.out_channels) for conv in convs]  # type: ignore[arg-type]
    factors, shifts = affine.weight.flatten().split(widths), affine.bias.split(widths)
    for path, conv, factor, shift in zip(paths, convs, factors, shifts, strict=True):
        parameters = list(model.get_submodule(path).parameters())
        model = set_module(model, path, like(absorb(conv, factor, shift), parameters))
    stays = _rest(model, norm) if rest is not None else None
    return set_module(model, norm, stays or _identity(model, norm))


def _own_class(module: nn.Module, path: str) -> nn.Module:
    """The conv of the user's class that a module is, or stands for."""
    return _plain_conv(module, path) if isinstance(module, ConvBlock) else module


def _fold_path(model: nn.Module, fold: FoldPath, conv: nn.Module) -> nn.Module:
    for path in fold.layers:
        new = conv if path == fold.at else _identity(model, path)
        if path == fold.rest:
            new = _rest(model, path) or new
        model = set_module(model, path, new)
    return model


def _identity(model: nn.Module, path: str) -> nn.Module:
    around = [type(model.get_submodule(outer)) for outer in ancestors(path)]
    fuses = any(hasattr(kind, method) for kind in around for method in METHODS)
    return identity_for(model.get_submodule(path)) if fuses else nn.Identity()


def _rest(model: nn.Module, path: str) -> nn.Module | None:
    """What stays of a norm with an activation: the user's own activation module."""
    return linear_part(model.get_submodule(path))[1]


def _in_float64(model: nn.Module) -> Read:
    """Gives copies of the model's modules in float64, in the modes that its own eval() gave them.

    A norm that a model keeps in batch mode stays so, and is no operator.
    """
    return lambda path: copy.deepcopy(model.get_submodule(path)).double()


def own_parameters(owner: nn.Module, value: LinearValue) -> list[nn.Parameter]:
    """The parameters that the forward of a region's owner reads itself, for this region."""
    names = [str(node.target) for node in value.nodes if node.op == "get_attr"]
    known = dict(owner.named_parameters(remove_duplicate=False))
    return [known[name] for name in names if name in known]


def fold_block(model: nn.Module, capture: Capture, fold: FoldBlock) -> nn.Module:
    """Folds a block into the conv that it stands for; its bias may go to a norm behind it."""
    conv = _plain_conv(model.get_submodule(fold.block), fold.block)
    if fold.bias_to:
        give_bias(conv, model.get_submodule(fold.bias_to))
    return set_module_everywhere(model, capture.aliases[fold.block], conv)


def _plain_conv(block: nn.Module, path: str) -> nn.Module:
    """The conv that a block stands for, with its own geometry, kernel collapsed."""
    if not isinstance(block, ConvBlock):
        raise ReparamError(
            f"the plan does not fit: it collapses a block, here is a {type(block).__name__}",
            path=path,
        )
    try:
        return plain_conv(block)
    except NotLinear as error:
        raise ReparamError(error.reason, path=path) from error
