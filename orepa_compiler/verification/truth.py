"""What a comparison holds to be right, in float64, and how noisy a lower precision is beside it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.errors import ReparamError
from orepa_compiler.verification.evaluation import (
    Batch,
    Outputs,
    Side,
    evaluate,
    own_dtype,
    paired,
)
from orepa_compiler.verification.nesting import is_comparable

# How many errors a noise floor is measured on, at least. The largest of few is luck: with a single
# output, right candidates came to 13 times the noise of one evaluation, and 1.3 times that of 64.
LEAST_ERRORS = 64

EPS32 = torch.finfo(torch.float32).eps

CASTS: dict[torch.dtype, Callable[[nn.Module], nn.Module]] = {
    torch.float32: nn.Module.float,
    torch.float16: nn.Module.half,
    torch.bfloat16: nn.Module.bfloat16,
}

NO_FLOAT64 = (
    "; the truth is evaluated in float64: give truth=, a module that runs in it, or give the "
    "reference as a function, to compare without one"
)


@dataclass(frozen=True)
class Truth:
    """The right outputs of each batch, and the same from a lower precision.

    outputs: in float64. noisy: once or more in the dtype `working`, where the noise shows; none
    where there is no module to evaluate. noise_scale: what noise measured there is multiplied by.
    """

    outputs: list[Outputs]
    noisy: list[list[Outputs]]
    working: torch.dtype
    noise_scale: float = 1.0
    notes: tuple[str, ...] = ()


def truth_of(
    reference: Any,
    truth: nn.Module | None,
    expected: list[Outputs],
    batches: list[Batch],
    asked: torch.dtype | None,
) -> Truth:
    """The truth of `truth`, or else of the reference, whose own outputs are `expected`.

    asked: the precision that the candidate computes in; None for that of the reference.

    Raises ReparamError when the module does not run in float64, or returns other outputs.
    """
    source = reference if truth is None else truth
    if not isinstance(source, nn.Module):
        note = (
            "no module to evaluate in float64: the reference's own outputs are the truth, and the "
            "tolerance comes from the dtype alone"
        )
        return Truth(expected, [], asked or first_dtype(expected), notes=(note,))
    own = (own_dtype(source) if source is reference else None) or first_dtype(expected)
    working, scale = asked or own, 1.0
    # The reference's own outputs are the first measure of its noise, where it is in that dtype.
    noisy = [expected] if source is reference and working == own else []
    if working == torch.float64:
        # Nothing finer tells the noise of float64: it is as many eps as that of float32.
        working, scale, noisy = torch.float32, torch.finfo(working).eps / EPS32, []
    exact, module = _exact_side(source)
    outputs = _checked(expected, evaluate(exact, batches))
    count = _evaluations(expected, module) - len(noisy)
    for side in _noisy_sides(module, exact.device, working, count, is_first=not noisy):
        noisy.append(_checked(expected, evaluate(side, batches)))
    return Truth(outputs, noisy, working, scale, tuple(_notes(outputs)))


def first_dtype(outputs: list[Outputs]) -> torch.dtype:
    """The dtype of the first floating output; float32 where there is none."""
    leaves = [leaf for batch in outputs for leaf in batch.leaves.values()]
    floating = [leaf.dtype for leaf in leaves if is_comparable(leaf) and leaf.is_floating_point()]
    return floating[0] if floating else torch.float32


def _exact_side(source: nn.Module) -> tuple[Side, nn.Module]:
    home = next((tensor.device for tensor in source.state_dict().values()), None)
    device = torch.device("cpu") if home and home.type == "mps" else home  # mps has no float64
    try:
        module = value_copy(source).to(device).double()
    except Exception as error:
        raise ReparamError(
            f"the reference cannot be copied: {type(error).__name__}: "
            f"{' '.join(str(error).split())}{NO_FLOAT64}"
        ) from error
    return Side("truth in float64", module, torch.float64, device, NO_FLOAT64), module


def _noisy_sides(
    exact: nn.Module,
    home: torch.device | None,
    working: torch.dtype,
    count: int,
    *,
    is_first: bool,
) -> Iterator[Side]:
    """The module in the dtype `working`, `count` times.

    All but the first have every weight moved by up to half an eps, so that everything after it
    rounds differently.
    """
    if not count:
        return
    generator = torch.Generator().manual_seed(0)
    # Half precision is measured on the CPU, whose kernels are the same on every machine.
    device = home if working == torch.float32 else torch.device("cpu")
    module = CASTS[working](copy.deepcopy(exact).to(device))
    for index in range(count):
        if index or not is_first:
            _perturb(module, exact, torch.finfo(working).eps, generator)
        yield Side(f"truth in {str(working).removeprefix('torch.')}", module, working, device)


@torch.no_grad()
def _perturb(module: nn.Module, exact: nn.Module, eps: float, generator: torch.Generator) -> None:
    for weight, right in zip(module.parameters(), exact.parameters(), strict=True):
        if weight.is_floating_point():
            part = torch.rand(weight.shape, generator=generator).to(right.device) - 0.5
            weight.copy_(right * (1 + eps * part.double()))


def _evaluations(expected: list[Outputs], module: nn.Module) -> int:
    """How many evaluations give LEAST_ERRORS errors of the smallest output; 1 without weights."""
    leaves = [leaf for outputs in expected for leaf in outputs.leaves.values()]
    sizes = [leaf.numel() for leaf in leaves if is_comparable(leaf) and leaf.is_floating_point()]
    fewest = min((size for size in sizes if size), default=LEAST_ERRORS)
    has_weights = any(weight.is_floating_point() for weight in module.parameters())
    return math.ceil(LEAST_ERRORS / fewest) if has_weights else 1


def _checked(expected: list[Outputs], found: list[Outputs]) -> list[Outputs]:
    outputs = [paired(*pair) for pair in zip(expected, found, strict=True)]
    for ours, theirs in zip(expected, outputs, strict=True):
        if ours.leaves.keys() != theirs.leaves.keys():
            raise ReparamError(
                f"the truth returns {', '.join(theirs.leaves) or 'nothing'}, the reference "
                f"{', '.join(ours.leaves) or 'nothing'}; give a truth with the same outputs"
            )
    return outputs


def _notes(outputs: list[Outputs]) -> Iterator[str]:
    for name, leaf in outputs[0].leaves.items() if outputs else ():
        if is_comparable(leaf) and leaf.is_floating_point() and leaf.dtype != torch.float64:
            dtype = str(leaf.dtype).removeprefix("torch.")
            yield f"the truth of {name} came back as {dtype}: the model casts inside"
