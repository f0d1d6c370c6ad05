"""A row: a block or a model, collapsed, counted, and compared with itself in float64."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from benchmarks.field.counting import counted
from benchmarks.field.registry import Published
from benchmarks.zoo.values import RECIPES, fill, settling
from orepa_compiler.verification.nesting import map_tensors, tensors_in

Row = dict[str, Any]

# Relative to the largest output; a net that amplifies rounding is allowed more. In float32 twice
# its own error; in float64 what verify allows: a fold rounds each weight two or three times.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_OF_ITS_OWN = 2.0
_OF_ROUNDING = 4.0
_DRAWS = 3


def filled(model: nn.Module, seed: str, inputs: tuple[Any, ...]) -> nn.Module:
    """The model in eval mode with random weights and norms that look trained."""
    fill(model.eval(), seed, RECIPES[0])
    with torch.no_grad(), settling(model):
        model(*inputs)
    return model


def block_inputs(block: Published) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, *block.shape, generator=generator),)


def examine_block(block: Published) -> Row:
    """The row of a published block. status: collapsed, refused (as it must be), or fail."""
    torch.manual_seed(0)
    inputs = block_inputs(block)
    model = filled(block.make(), block.name, inputs)
    row: Row = {"kind": "block", "name": block.name, "source": block.source}
    row |= examine(model, inputs)
    row |= {"expected_convs": block.convs, "refused": block.refused}
    return {**row, "status": _block_status(block, row)}


def examine(model: nn.Module, inputs: tuple[Any, ...]) -> Row:
    """Counts before and after, and the errors against the model itself in float64.

    noise: the error of the untouched model in float32. rounding: what one ulp in each weight of the
    untouched model does in float64, measured where the error there is above 1e-12. adopted: modules
    that were replaced by what their own method makes.
    """
    plain = double(inputs)
    exact = copy.deepcopy(model).double()
    truth = outputs(exact, plain)
    float64 = error(outputs(_collapsed(copy.deepcopy(exact), plain), plain), truth)
    is_small = float64 <= TOLERANCE[torch.float64]
    deploy = orepa.collapse(model, inputs=inputs)
    done = orepa.recorded_plans(deploy)[-1]
    plan = done.of("collapse")
    one = map_tensors(inputs, lambda tensor: tensor[:1])
    return {
        "regions": len(plan.edits),
        "adopted": len(done.of("adopt").edits),
        "reasons": sorted({refusal.reason for refusal in plan.refusals}),
        "before": asdict(counted(model, one)),
        "after": asdict(counted(deploy, one)),
        "float64": float64,
        "rounding": None if is_small else _rounding(exact, plain, truth),
        "float32": error(outputs(deploy, inputs), truth),
        "noise": error(outputs(model, inputs), truth),
    }


def _collapsed(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    return orepa.collapse(model, inputs=inputs, inplace=True)


def _rounding(model: nn.Module, inputs: tuple[Any, ...], truth: list[Tensor]) -> float:
    """The largest error of several draws, each with every parameter moved by at most one ulp."""
    generator = torch.Generator().manual_seed(0)
    return max(
        error(outputs(_nudged(copy.deepcopy(model), generator), inputs), truth)
        for _ in range(_DRAWS)
    )


@torch.no_grad()
def _nudged(model: nn.Module, generator: torch.Generator) -> nn.Module:
    for value in model.parameters():
        part = 2 * torch.rand(value.shape, generator=generator, dtype=value.dtype) - 1
        value.mul_(1 + torch.finfo(value.dtype).eps * part)
    return model


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """max |a - b| / max |b|, of the worst output; infinite where outputs differ in kind."""
    if len(actual) != len(expected):
        return float("inf")
    errors = []
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape or not bool(a.isfinite().all()):
            return float("inf")
        errors.append(float((a.double() - b.double()).abs().max() / b.double().abs().max()))
    return max(errors)


def _block_status(block: Published, row: Row) -> str:
    if not is_sound(row) or row["after"]["convs"] != block.convs:
        return "fail"
    if block.refused is None:
        return "collapsed"
    return "refused" if any(block.refused in reason for reason in row["reasons"]) else "fail"


def is_sound(row: Row) -> bool:
    """Exact, no norm left alone behind a conv, and no more MACs than before."""
    exact = max(TOLERANCE[torch.float64], _OF_ROUNDING * (row.get("rounding") or 0.0))
    single = max(TOLERANCE[torch.float32], _OF_ITS_OWN * row["noise"])
    return (
        row["float64"] <= exact
        and row["float32"] <= single
        and row["after"]["behind"] == 0
        and row["after"]["macs"] <= row["before"]["macs"]
    )


@torch.no_grad()
def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors_in(model(*inputs))]


def double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    doubled: tuple[Any, ...] = map_tensors(inputs, lambda tensor: tensor.double())
    return doubled
