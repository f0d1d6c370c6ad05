"""Makes the edits of collapse: what goes, what comes and what it counts, for each kind of fold."""

from __future__ import annotations

from torch import Tensor, nn

from orepa_compiler.algebra.classifiers import holds_kernel, is_idle
from orepa_compiler.analysis.functional import functional_conv
from orepa_compiler.blocks import LINEARIZED, ConvBlock
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.blocks.own_forward import own_conv
from orepa_compiler.capture import Capture, ancestors
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes.collapse.bias import bias_taker
from orepa_compiler.passes.collapse.candidates import Candidate, called, is_inside
from orepa_compiler.passes.collapse.folding import own_parameters
from orepa_compiler.passes.collapse.folds import (
    AbsorbNorm,
    Fold,
    FoldBlock,
    FoldConcatenation,
    FoldGraph,
    FoldPath,
    fold_options,
)
from orepa_compiler.planning import Edit


def region_edit(name: str, capture: Capture, one: Candidate) -> Edit:
    """The edit for a region: which modules go, and where the one conv stands."""
    region = one.region
    paths = list(called(capture, region))
    operator = region.value.operator
    assert operator is not None
    after = operator.weight.numel() + operator.out_channels
    fold = _region_fold(capture, one, paths)
    gone = [capture.module(path) for path in fold.modules]
    size = _size(*gone)
    size += sum(p.numel() for p in own_parameters(capture.module(region.owner), region.value))
    names = [type(module).__name__ for module in gone if not is_idle(module)]
    names += filter(None, map(functional_conv, region.value.nodes))
    target = _conv_text(operator.in_channels, operator.out_channels, operator.kernel_size)
    path = fold.at if isinstance(fold, FoldPath) else region.owner
    return _edit(name, path, " + ".join(names), target, (size, after), fold)


def _region_fold(capture: Capture, one: Candidate, paths: list[str]) -> FoldPath | FoldGraph:
    before, behind = one.before, one.behind
    region = one.region
    modules = (*([before] if before else []), *paths, *([behind] if behind else []))
    nodes, source = tuple(region.node_names), region.value.source.name
    if not region.is_path:
        return FoldGraph(region.owner, nodes, source, modules, before, behind)
    at = next(path for path in paths if holds_kernel(capture.module(path)))
    rest = paths[-1] if region.value.rest is not None else None
    return FoldPath(region.owner, nodes, source, modules, before, behind, at, rest)


def absorption_edit(name: str, capture: Capture, conv: str, norm: str) -> Edit:
    """The edit that folds a norm into a conv that is no operator of the algebra."""
    modules = [capture.module(path) for path in (conv, norm)]
    what = " + ".join(type(module).__name__ for module in modules)
    sizes = (_size(*modules), _folded_size(modules[0]))
    target = type(own_conv(modules[0])).__name__
    return _edit(name, conv, what, target, sizes, AbsorbNorm(conv, norm))


def concatenation_edit(name: str, capture: Capture, convs: list[str], norm: str) -> Edit:
    """The edit that folds a norm into the convs whose concatenation it reads, each its channels."""
    modules = [capture.module(path) for path in (*convs, norm)]
    what = f"{len(convs)} concatenated convs + {type(modules[-1]).__name__}"
    around = [path for path in ancestors(norm) if path in capture.graphs]
    within = next(a for a in around if all(is_inside(path, {a}) for path in convs))
    sizes = (_size(*modules), sum(_folded_size(module) for module in modules[:-1]))
    fold = FoldConcatenation(tuple(convs), norm, within)
    return _edit(name, norm, what, f"{len(convs)} convs", sizes, fold)


def block_edit(name: str, capture: Capture, path: str, block: ConvBlock, fold_norm: bool) -> Edit:
    """The edit that makes a block the conv it stands for; without fold_norm, as it was built.

    Raises ReparamError where that conv had no place for the bias, and nothing else has one.
    """
    is_shifted = block.norm is not None or isinstance(block, OfflineBlock)
    taker = None
    if not fold_norm:
        if block.block_name == LINEARIZED:
            raise ReparamError(
                "its branches were linearized, so the norms they had are gone; use fold_norm=True",
                path=path,
            )
        if is_shifted and not block.replaces_bias:
            taker = bias_taker(capture, path, block)
    has_bias = (block.replaces_bias or is_shifted) and taker is None
    after = block.operator().weight.numel() + (block.out_channels if has_bias else 0)
    target = _conv_text(block.in_channels, block.out_channels, block.kernel_size)
    what = f"block {block.block_name}"
    return _edit(name, path, what, target, (_size(block), after), FoldBlock(path, taker))


def _edit(
    name: str, path: str, before: str, after: str, sizes: tuple[int, int], fold: Fold
) -> Edit:
    return Edit(name, path, before, after, sizes, options=fold_options(fold))


def _size(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _folded_size(conv: nn.Module) -> int:
    """The parameters of a conv that has taken a norm."""
    kernel = conv.weight
    assert isinstance(kernel, Tensor)
    return kernel.numel() + int(conv.out_channels)  # type: ignore[arg-type]


def _conv_text(in_channels: int, out_channels: int, kernel_size: tuple[int, ...]) -> str:
    kernel = "x".join(map(str, kernel_size))
    return f"Conv{len(kernel_size)}d {in_channels} -> {out_channels} {kernel}"
