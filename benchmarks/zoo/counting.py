"""The convs and norms of a model, what the plan does with each conv, and what it says why not."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from orepa_compiler.algebra.classifiers import is_batch_norm, is_conv_like
from orepa_compiler.planning import Plan

_NAMES = (
    (re.compile(r"the forward of \S+"), "the forward of a module"),
    (re.compile(r"is shared with .*"), "is shared with another module"),
    (re.compile(r"registered as .*"), "registered under several names"),
    (re.compile(r"cannot be traced \((\w+).*\)"), r"cannot be traced (\1)"),
    (re.compile(r"\b\d+\b"), "N"),
)


@dataclass(frozen=True)
class Convs:
    """Paths of the convs. spatial: more than one tap, no patch embedding, not transposed."""

    all: frozenset[str]
    spatial: frozenset[str]
    transposed: frozenset[str]


def convs_of(model: nn.Module) -> Convs:
    layers: dict[str, Any] = {p: m for p, m in model.named_modules() if is_conv_like(m)}
    transposed = {path for path, conv in layers.items() if conv.transposed}
    spatial = {
        path
        for path, conv in layers.items()
        if max(conv.kernel_size) > 1 and tuple(conv.kernel_size) != tuple(conv.stride)
    }
    return Convs(frozenset(layers), frozenset(spatial - transposed), frozenset(transposed))


def count_plan(convs: Convs, plan: Plan) -> dict[str, Any]:
    """How many convs a plan expands, and why the others stay; silent: in neither list."""
    part = plan.of("expand")
    expanded = {edit.path for edit in part.edits} & convs.all
    refused = {r.path: normalised(r.reason) for r in part.refusals if r.path in convs.all}
    return {
        "expanded": len(expanded),
        "spatial_expanded": len(expanded & convs.spatial),
        "reasons": dict(Counter(refused.values()).most_common()),
        "spatial_reasons": dict(
            Counter(why for path, why in refused.items() if path in convs.spatial).most_common()
        ),
        "silent": sorted(convs.all - expanded - refused.keys()),
    }


def normalised(reason: str) -> str:
    """A reason without the names and numbers of its model, so that equal ones can be counted."""
    for pattern, text in _NAMES:
        reason = pattern.sub(text, reason)
    return reason.removesuffix("; ask for it with where=")


@dataclass
class NormsSeen:
    """Batch norms, and those whose input is what a conv or linear layer just returned."""

    total: int = 0
    behind: set[str] = field(default_factory=set)


@contextmanager
def watching_norms(model: nn.Module) -> Iterator[NormsSeen]:
    """What the norms read while the model runs: seen in the run, not taken from a plan."""
    seen = NormsSeen(total=sum(is_batch_norm(m) for m in model.modules()))
    made: dict[int, weakref.ref[Tensor]] = {}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made[id(output)] = weakref.ref(output)

    def before(path: str) -> Any:
        def look(module: nn.Module, args: Any) -> None:
            value = args[0] if args and isinstance(args[0], Tensor) else None
            for tensor in (value, getattr(value, "_base", None)):
                if tensor is not None and id(tensor) in made and made[id(tensor)]() is tensor:
                    seen.behind.add(path)

        return look

    handles = []
    for path, module in model.named_modules():
        if is_conv_like(module) or isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(after))
        elif is_batch_norm(module):
            handles.append(module.register_forward_pre_hook(before(path)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
