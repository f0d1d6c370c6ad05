"""Nets, and a pass that is wrong by intent, for the tests of the trial of a rewrite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.capture import Capture
from orepa_compiler.passes import COLLAPSE, Pipeline
from orepa_compiler.planning import Edit, Plan
from orepa_compiler.rewriting.swapping import set_module
from tests.norms import randomise_norms


class Link(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def chain() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(Link(3, 4), Link(4, 5), Link(5, 6))
    return randomise_norms(net).eval()  # type: ignore[return-value]


def images(scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return scale * torch.randn(2, 3, 8, 8, generator=generator)


class Above(nn.Module):
    """A conv that is another where its input is large."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return y * 1.5 if float(x.abs().max()) > 50 else y


def scaled(conv: nn.Module) -> nn.Module:
    made = copy.deepcopy(conv)
    with torch.no_grad():
        made.weight.mul_(1.5)  # type: ignore[operator]
    return made


@dataclass(frozen=True)
class Swap:
    """Replaces each conv: those whose path is in `wrong` by what `by` makes, others by a copy."""

    wrong: tuple[str, ...]
    by: Callable[[nn.Module], nn.Module] = scaled
    says: bool = True
    name: str = "swap"
    training: bool | None = False
    preserves: frozenset[str] = frozenset({"eval"})

    def plan(self, capture: Capture) -> Plan:
        found = capture.skeleton.named_modules()
        convs = [path for path, module in found if isinstance(module, nn.Conv2d)]
        edits = tuple(Edit(self.name, path, "Conv2d", "Conv2d", (1, 1)) for path in convs)
        return Plan(edits if self.says else ())

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        paths = [edit.path for edit in plan.edits] if self.says else list(self.wrong)
        for path in paths:
            conv = model.get_submodule(path)
            made = self.by(conv) if path in self.wrong else copy.deepcopy(conv)
            model = set_module(model, path, made)
        return model, plan


def with_wrong(*paths: str, **options: Any) -> Pipeline:
    """What collapse runs, behind a pass that is wrong at these paths."""
    return Pipeline((Swap(paths, **options), *COLLAPSE.passes))
