"""Right pairs: a model and a candidate that computes the same, in every precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import orepa_compiler as orepa
from benchmarks.verdict.nets import FAMILIES, Subject, subject
from orepa_compiler.verification import Report, verify_callables

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Pair:
    """A family's net of one seed, one way to rewrite it, and the precision of the rewritten one."""

    family: str
    seed: int
    form: str
    precision: str

    def __str__(self) -> str:
        return f"{self.family} {self.seed}, {self.form}, {self.precision}"


def _channels_last(model: nn.Module) -> nn.Module:
    return orepa.collapse(model).to(memory_format=torch.channels_last)


@torch.no_grad()
def folded_in_place(model: nn.Module) -> nn.Module:
    """Norms folded by the textbook's formula in the weights' own precision, as many tools do."""
    folded = copy.deepcopy(model)
    for module in folded.modules():
        children = list(module.children())
        is_pair = isinstance(module, nn.Sequential) and len(children) == 2
        if (
            is_pair
            and isinstance(children[0], nn.Conv2d)
            and isinstance(children[1], nn.BatchNorm2d)
        ):
            conv, norm = children
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            bias = norm.bias - norm.running_mean * scale
            if conv.bias is not None:
                bias = bias + conv.bias * scale
            conv.weight.mul_(scale[:, None, None, None])
            conv.bias = nn.Parameter(bias)
            module[1] = nn.Identity()
    return folded


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "collapsed": orepa.collapse,
    "channels last": _channels_last,
    "folded in its own precision": folded_in_place,
}


def pairs(seeds: int) -> Iterator[Pair]:
    """Every family, form and precision, for as many seeds."""
    for seed in range(seeds):
        for family in FAMILIES:
            for form in FORMS:
                for precision in DTYPES:
                    # The largest net in half precision takes seconds on a CPU: every third seed.
                    is_slow = family == "YOLO-like" and precision in ("bf16", "fp16")
                    if not is_slow or seed % 3 == 0:
                        yield Pair(family, seed, form, precision)


def judged(pair: Pair) -> Report:
    """The verdict on a right pair."""
    found = subject(pair.family, pair.seed)
    model, inputs = _placed(found, pair.precision)
    candidate = FORMS[pair.form](model)
    if pair.precision in ("float64", "float32"):
        return verify_callables(model, candidate, inputs, stress=True)
    candidate = candidate.to(DTYPES[pair.precision])
    return verify_callables(model, candidate, inputs, precision=pair.precision, stress=True)


def _placed(found: Subject, precision: str) -> tuple[nn.Module, torch.Tensor]:
    if precision == "float64":
        return found.model.double(), found.inputs.double()
    return found.model, found.inputs
