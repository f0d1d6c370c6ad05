"""Takes the truth in float64, and how noisy a lower precision is beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

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
from orepa_compiler.verification.nesting import is_comparable, is_smooth, map_tensors
from orepa_compiler.verification.outputs.decisions import Decision
from orepa_compiler.verification.summation import OtherSums

# How many errors a noise floor is measured on, at least. The largest of few is luck: with a single
# output, right candidates came to 13 times the noise of one evaluation, and 1.3 times that of 64.
LEAST_ERRORS = 64

# At least so many of those evaluations have every weight rounded anew: a right candidate has other
# weights than the reference, each rounded once more. A single one of them was too small for YOLOs.
LEAST_ROUNDINGS = 1

# float64 has nothing finer to be measured by: its noise is what two roundings of it differ by.
ROUNDINGS_OF_FLOAT64 = 2

# Where a mask or an index cannot be followed to what it was decided on, weights are moved so often,
# and so many eps: what changes its value meanwhile is not decided clearly.
SHAKES, SHAKEN_EPS = 8, 8.0

# In one of so many of those evaluations norms behind convs are added up as a fold does, and means
# by running sums: the first takes each conv twice.
OTHER_SUMS = 2

_REGISTRIES = ("_parameters", "_buffers", "_modules")

NO_FLOAT64 = (
    "; the truth is evaluated in float64: give truth=, a module that runs in it, or give the "
    "reference as a function, to compare without one"
)


@dataclass(frozen=True)
class Truth:
    """The right outputs of each batch, and the same from a lower precision.

    outputs: in float64. noisy: once or more in the dtype `working`, where the noise shows; none
    where there is no module to evaluate. decisions: of each batch, what masks and indices were
    decided on. unclear: of each batch, where those that could not be followed may be either.
    noise_name: what the noise is of, where it is not the dtype's own.
    """

    outputs: list[Outputs]
    noisy: list[list[Outputs]]
    working: torch.dtype
    notes: tuple[str, ...] = ()
    decisions: tuple[dict[str, Decision], ...] = ()
    unclear: tuple[dict[str, Tensor], ...] = ()
    noise_name: str = ""

    def decisions_of(self, batch: int) -> dict[str, Decision]:
        """By name, what the outputs of a batch were decided on."""
        return self.decisions[batch] if batch < len(self.decisions) else {}

    def unclear_of(self, batch: int) -> dict[str, Tensor]:
        """By name, where the outputs of a batch may be either."""
        return self.unclear[batch] if batch < len(self.unclear) else {}


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
    working = asked or own
    follows = any(_is_decided(leaf) for outputs in expected for leaf in outputs.leaves.values())
    exact, module = _exact_side(source)
    outputs = _checked(expected, evaluate(exact, batches, follows=follows))
    # The reference's own outputs are the first measure of its noise, where it is in that dtype.
    is_own = source is reference and working == own
    noisy, watched = [expected] if is_own and working != torch.float64 else [], []
    count = _evaluations(expected, module, working) - len(noisy)
    sides = _noisy_sides(source, module, working, max(count, 0), is_first=not is_own)
    for number, side in enumerate(sides):
        with nullcontext() if number % OTHER_SUMS else OtherSums():
            watched.append(_checked(expected, evaluate(side, batches, follows=follows)))
    decisions = _decisions(outputs, watched) if follows else ()
    unclear = _unclear(expected, outputs, decisions, (source, module, working), batches)
    return Truth(outputs, [*noisy, *watched], working, tuple(_notes(outputs)), decisions, unclear)


def first_dtype(outputs: list[Outputs]) -> torch.dtype:
    """The dtype of the first floating output; float32 where there is none."""
    leaves = [leaf for batch in outputs for leaf in batch.leaves.values()]
    floating = [leaf.dtype for leaf in leaves if is_comparable(leaf) and leaf.is_floating_point()]
    return floating[0] if floating else torch.float32


def _is_decided(leaf: Any) -> bool:
    """Whether a leaf is a mask or an index, or a mask that was cast to numbers."""
    if not is_smooth(leaf) or leaf.is_complex():
        return not is_smooth(leaf)
    return bool(leaf.numel()) and bool(((leaf == 0) | (leaf == 1)).all())


def _exact_side(source: nn.Module) -> tuple[Side, nn.Module]:
    home = _home(source)
    device = torch.device("cpu") if home and home.type == "mps" else home  # mps has no float64
    module = _typed_copy(source, torch.float64, device)
    return Side("truth in float64", module, torch.float64, device, NO_FLOAT64), module


def _home(source: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in source.state_dict().values()), None)


def _typed_copy(source: nn.Module, dtype: torch.dtype, device: torch.device | None) -> nn.Module:
    """A copy in another type: also of the plain tensors on modules that have the model's own type.

    One of another type than the model is in that type on purpose.
    """
    own = own_dtype(source) or torch.get_default_dtype()
    try:
        module = value_copy(source).to(device=device, dtype=dtype)
    except Exception as error:
        raise ReparamError(
            f"the reference cannot be copied: {type(error).__name__}: "
            f"{' '.join(str(error).split())}{NO_FLOAT64}"
        ) from error
    for child in module.modules():
        for name, value in vars(child).items():
            if name not in _REGISTRIES and type(value) in (Tensor, list, tuple, dict):
                vars(child)[name] = map_tensors(
                    value, lambda t: t.to(device=device, dtype=dtype if t.dtype == own else t.dtype)
                )
    return module


def _noisy_sides(
    source: nn.Module,
    exact: nn.Module,
    working: torch.dtype,
    count: int,
    *,
    is_first: bool,
    eps: float = 1.0,
) -> Iterator[Side]:
    """The module in the dtype `working`, `count` times.

    All, but the first where it is the first in that dtype, have every weight, and every norm's
    statistics, moved by up to half an eps: they are weights of another rounding, and everything
    after them rounds differently. eps: how many times as far.
    """
    if not count:
        return
    generator = torch.Generator().manual_seed(0)
    # Half precision is measured on the CPU, whose kernels are the same on every machine.
    is_wide = working in (torch.float32, torch.float64)
    device = _home(exact) if is_wide else torch.device("cpu")
    module = _typed_copy(source, working, device)
    for index in range(count):
        if index or not is_first or working == torch.float64:
            _perturb(module, exact, eps * torch.finfo(working).eps, generator)
        yield Side(f"truth in {str(working).removeprefix('torch.')}", module, working, device)


@torch.no_grad()
def _perturb(module: nn.Module, exact: nn.Module, eps: float, generator: torch.Generator) -> None:
    weights = zip(module.parameters(), exact.parameters(), strict=True)
    # A norm's statistics go into a folded weight; another buffer may hold indices, or a grid.
    for weight, right in chain(weights, _statistics(module, exact)):
        if weight.is_floating_point():
            part = torch.rand(weight.shape, generator=generator).to(right.device) - 0.5
            weight.copy_(right * (1 + eps * part.double()))


def _statistics(module: nn.Module, exact: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The running mean and variance of each norm, in both."""
    for ours, theirs in zip(module.modules(), exact.modules(), strict=True):
        if isinstance(ours, _NormBase) and ours.running_mean is not None:
            assert isinstance(theirs, _NormBase)
            for name in ("running_mean", "running_var"):
                yield ours.get_buffer(name), theirs.get_buffer(name)


def _evaluations(expected: list[Outputs], module: nn.Module, working: torch.dtype) -> int:
    """How many evaluations give LEAST_ERRORS errors of the smallest output; 1 without weights."""
    leaves = [leaf for outputs in expected for leaf in outputs.leaves.values()]
    sizes = [leaf.numel() for leaf in leaves if is_comparable(leaf) and leaf.is_floating_point()]
    fewest = min((size for size in sizes if size), default=LEAST_ERRORS)
    if not any(weight.is_floating_point() for weight in module.parameters()):
        return 1
    least = ROUNDINGS_OF_FLOAT64 if working == torch.float64 else 1 + LEAST_ROUNDINGS
    return max(least, math.ceil(LEAST_ERRORS / fewest))


def _decisions(
    outputs: list[Outputs], noisy: list[list[Outputs]]
) -> tuple[dict[str, Decision], ...]:
    """Of each batch, what was followed in every precision, with its noise."""
    found = []
    for index, exact in enumerate(outputs):
        others = [batches[index].decisions for batches in noisy]
        measured = {
            name: decision.with_noise([other.get(name) for other in others])
            for name, decision in exact.decisions.items()
        }
        found.append({name: d for name, d in measured.items() if d is not None})
    return tuple(found)


def _unclear(
    expected: list[Outputs],
    outputs: list[Outputs],
    decisions: tuple[dict[str, Decision], ...],
    modules: tuple[nn.Module, nn.Module, torch.dtype],
    batches: list[Batch],
) -> tuple[dict[str, Tensor], ...]:
    """Of each batch, where a value that was not followed is another when weights are moved."""
    asked = [
        [n for n, leaf in exact.leaves.items() if not is_smooth(leaf) and n not in known]
        for exact, known in zip(outputs, decisions, strict=False)
    ]
    if not any(asked):
        return ()
    found: list[dict[str, Tensor]] = [{} for _ in outputs]
    for side in _noisy_sides(*modules, SHAKES, is_first=False, eps=SHAKEN_EPS):
        shaken = _checked(expected, evaluate(side, batches))
        for index, names in enumerate(asked):
            for name in names:
                right, other = outputs[index].leaves[name], shaken[index].leaves[name]
                if is_comparable(right) and is_comparable(other) and right.shape == other.shape:
                    known = found[index].get(name, torch.zeros(right.shape, dtype=torch.bool))
                    found[index][name] = known | (right != other)
    return tuple(found)


def _checked(expected: list[Outputs], found: list[Outputs]) -> list[Outputs]:
    outputs = [paired(*pair, strict=False) for pair in zip(expected, found, strict=True)]
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
