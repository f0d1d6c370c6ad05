"""The forms that are compared: each makes a net to train of a plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from benchmarks.study.normalized import normalized
from benchmarks.study.preconditioned import diagonally_preconditioned, preconditioned
from orepa_compiler.blocks import Block, ConvBlock, initialization

# A plain net and a batch of images -> the net that is trained.
Form = Callable[[nn.Module, Tensor], nn.Module]

REDUCTIONS = (0.0, 0.03, 0.1, 0.3, 1.0)
_TINY = 1e-6  # a spread that is rounding


@dataclass(frozen=True)
class Arm:
    """form: makes it. means: in words, for the page."""

    form: Form
    means: str


def _expanded(**options: object) -> Form:
    return lambda net, images: orepa.expand(net, **options)  # type: ignore[arg-type]


def _preserving(reduction: float, **options: object) -> Form:
    def form(net: nn.Module, images: Tensor) -> nn.Module:
        with _reduction(reduction):
            return orepa.expand(net, **options)  # type: ignore[arg-type]

    return form


@contextmanager
def _reduction(factor: float) -> Iterator[None]:
    """What preserve multiplies the other branches' scaling with."""
    before = initialization.REDUCTION
    initialization.REDUCTION = factor
    try:
        yield
    finally:
        initialization.REDUCTION = before


def _scaled_from_data(**options: object) -> Form:
    """Each branch scaled once, so that its output has a standard deviation of 1 per channel."""

    def form(net: nn.Module, images: Tensor) -> nn.Module:
        made = orepa.expand(net, **options)  # type: ignore[arg-type]
        hooks = [
            block.register_forward_pre_hook(_set_scale)
            for block in made.modules()
            if isinstance(block, ConvBlock) and block.scaling is not None
        ]
        with torch.no_grad():
            made.train()(images)
        for hook in hooks:
            hook.remove()
        for norm in made.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
        return made

    return form


@torch.no_grad()
def _set_scale(block: ConvBlock, args: tuple[Tensor]) -> None:
    assert block.scaling is not None
    for factors, branch in zip(block.scaling, block.branches.values(), strict=True):
        spread = branch.operator()(args[0]).std((0, 2, 3))  # type: ignore[operator]
        # a channel that is zero, as with a filter that is zero on all taps, stays
        factors.copy_(torch.where(spread > _TINY, 1 / spread.clamp_min(_TINY), factors))


def without(block: Block, name: str) -> Block:
    """The block with one branch less."""
    rest = {key: maker for key, maker in block.branches.items() if key != name}
    return replace(block, branches=rest)


def _spatial(path: str, conv: nn.Module) -> bool:
    return isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1)


ARMS: dict[str, Arm] = {
    "plain": Arm(lambda net, images: net, "the net as it is"),
    "OREPA, paper": Arm(_expanded(init="paper"), "OREPA with the published start"),
    **{
        f"OREPA, preserve {factor:g}": Arm(
            _preserving(factor), f"OREPA from the plain net's kernels, other branches x {factor:g}"
        )
        for factor in REDUCTIONS
    },
    "OREPA, one conv": Arm(
        _preserving(initialization.REDUCTION, block=orepa.OREPA, where=_spatial),
        "OREPA from the plain net's kernels on all k x k convs, also without residual connections",
    ),
    "OREPA, branch norms": Arm(
        _expanded(block=orepa.OREPA_VGG), "explicit branches, each with a norm, in all nets"
    ),
    **{
        name: Arm(_expanded(block=block, init="paper", where=_spatial), means)
        for name, block, means in (
            (
                "MobileOne",
                orepa.MOBILEONE,
                "four k x k, 1 x 1, identity, each with a norm (offline)",
            ),
            ("ACNet", orepa.ACNET, "k x k, 1 x k, k x 1, each with a norm (offline)"),
            ("ExpandNet", orepa.EXPAND_NET, "1 x 1 - k x k - 1 x 1, four times as wide inside"),
            ("DO-Conv", orepa.DO_CONV, "the kernel times a depthwise one"),
        )
    },
    "gradient": Arm(
        preconditioned,
        "the plain net; each kernel's gradient is multiplied by J J^T, where J is the derivative "
        "of the kernel of OREPA's block by its parameters, at its start",
    ),
    "gradient, diagonal": Arm(
        diagonally_preconditioned, "the same with the diagonal of J J^T alone: a rate per weight"
    ),
    "DBB": Arm(
        _expanded(block=orepa.DBB, init="paper", where=_spatial), "branches with norms (offline)"
    ),
    "RepVGG": Arm(
        _expanded(block=orepa.REPVGG, init="paper", where=_spatial),
        "k x k, 1 x 1, identity, each with a norm (offline)",
    ),
    "scalar scaling": Arm(
        _expanded(block=replace(orepa.OREPA, scaling_layer="scalar"), init="paper", where=_spatial),
        "OREPA, one factor for each branch",
    ),
    "no scaling": Arm(
        _expanded(block=replace(orepa.OREPA, scaling_layer="none"), init="paper", where=_spatial),
        "OREPA, no scaling layers",
    ),
    "vector scaling": Arm(
        _expanded(block=orepa.OREPA, init="paper", where=_spatial),
        "OREPA on all k x k convs, nothing else",
    ),
    "no norm behind the sum": Arm(
        lambda net, images: orepa.expand(
            orepa.collapse(net.eval()),
            block=orepa.OREPA,
            init="paper",
            where=_spatial,
            post_norm="none",
        ),
        "OREPA on all k x k convs of the net without its BatchNorms",
    ),
    **{
        f"without {name}": Arm(
            _expanded(block=without(orepa.OREPA, name), init="paper", where=_spatial),
            f"OREPA on all k x k convs, without the branch {name}",
        )
        for name in orepa.OREPA.branches
        if name != "origin"
    },
    "deep stem": Arm(_expanded(init="paper"), "OREPA with the deep stem"),
    "stem as k x k": Arm(
        _expanded(block=orepa.OREPA, init="paper"), "OREPA with the block of all k x k convs"
    ),
    "normalized": Arm(
        _expanded(block=normalized(orepa.OREPA), init="paper", where=_spatial),
        "each branch's kernel divided by its norm per output channel; scaling layers start at 1",
    ),
    "standardized": Arm(
        _expanded(block=normalized(orepa.OREPA, centred=True), init="paper", where=_spatial),
        "each branch's kernel with mean 0 and norm 1 per output channel; scaling layers start at 1",
    ),
    "normalized, preserve": Arm(
        _preserving(0.3, block=normalized(orepa.OREPA, but=("origin",)), where=_spatial),
        "the origin from the plain net's kernel, the other branches normalized, x 0.3",
    ),
    "scaled from data": Arm(
        _scaled_from_data(block=orepa.OREPA, init="paper", where=_spatial),
        "scaling layers set once so that each branch's output has standard deviation 1",
    ),
}
