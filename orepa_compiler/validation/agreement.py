"""Compares a rewritten model with the model: outputs, what runs, and what is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import ancestors
from orepa_compiler.validation.behaviour import Behaviour
from orepa_compiler.verification.nesting import is_comparable
from orepa_compiler.verification.outputs.comparison import magnitude_of


@dataclass(frozen=True)
class Disagreement:
    """One thing that a rewritten model does otherwise.

    text: what, with the numbers. error: of an output, relative to its largest value; None for what
    is no output. call: the number of the call. places: the modules to blame, where they are known.
    """

    text: str
    error: float | None = None
    call: int | None = None
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """What the model was made of before it was rewritten."""

    paths: frozenset[str]
    parameters: tuple[tuple[str, Tensor], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        paths = frozenset(path for path, _ in model.named_modules(remove_duplicate=False))
        return cls(paths, tuple(model.named_parameters(remove_duplicate=False)))


def output_difference(
    stock: Behaviour, made: Behaviour, *, tolerance: float
) -> Disagreement | None:
    """The first call whose outputs are farther apart than the tolerance, at its worst output."""
    for number, (right, found) in enumerate(zip(stock.outputs, made.outputs, strict=False)):
        if isinstance(right, str):  # the model itself refuses this call
            continue
        where = str(stock.calls[number])
        if isinstance(found, str):
            return Disagreement(f"it raised {found} on {where}", float("inf"), number)
        error, name = largest_error(right, found)
        if not error <= tolerance:
            shown = f"{error:.2g} at {name}, {where}"
            return Disagreement(shown, error, number)
    return None


def largest_error(right: dict[str, Any], found: dict[str, Any]) -> tuple[float, str]:
    """The largest error of any leaf, and which: inf where leaves, shapes or types differ."""
    if right.keys() != found.keys():
        missing = sorted(right.keys() ^ found.keys())[0]
        return float("inf"), missing
    errors = {name: leaf_error(value, found[name]) for name, value in right.items()}
    worst = max(errors, key=lambda name: errors[name], default="")
    return errors.get(worst, 0.0), worst


def leaf_error(right: Any, found: Any) -> float:
    """max |found - right| / max |right| of two leaves; NaN beside NaN agrees.

    Of tensors that hold no fractions, the share of entries that differ.
    """
    if not isinstance(right, Tensor):
        is_plain = isinstance(right, (str, bytes))
        return float("inf") if is_plain and right != found else 0.0
    if not isinstance(found, Tensor) or right.shape != found.shape or right.dtype != found.dtype:
        return float("inf")
    if not right.numel() or not (is_comparable(right) and is_comparable(found)):
        return 0.0
    if not (right.is_floating_point() or right.is_complex()):
        return float((right != found).double().mean())
    both = right.isfinite() & found.isfinite()
    if not torch.equal(
        torch.where(both, 0, right).nan_to_num(9e9), torch.where(both, 0, found).nan_to_num(9e9)
    ):
        return float("inf")
    wide = torch.complex128 if right.is_complex() else torch.float64
    exact, other = (torch.where(both, t, 0).to(wide) for t in (right, found))
    return float((other - exact).abs().max()) / magnitude_of(exact)


def stale_modules(stock: Behaviour, made: Behaviour, places: Iterable[str]) -> Disagreement | None:
    """The places where what an edit put runs less often than what stood there before."""
    both = [path for path in places if path in stock.counts and path in made.counts]
    stale = [path for path in both if made.counts[path] < stock.counts[path]]
    if not stale:
        return None
    ran = "never ran" if not made.counts[stale[0]] else "did not run each time"
    text = f"what was put in its place {ran}: the forward reaches it by another way than its name"
    return Disagreement(text, places=tuple(stale))


def training_difference(
    stock: Behaviour, made: Behaviour, origin: Origin, product: nn.Module
) -> Disagreement | None:
    """What a step would train otherwise: strange tensors, or parameters without a gradient.

    Nothing is told of a model that raises in train mode itself, as a detector without targets.
    """
    if stock.raised:
        return None
    if made.raised:
        return Disagreement(f"in train mode it raised {made.raised}", float("inf"))
    if len(made.strangers) > len(stock.strangers):
        return _strange(origin, made, len(made.strangers) - len(stock.strangers))
    wanted = {n: p for n, p in product.named_parameters(remove_duplicate=False) if p.requires_grad}
    lost = [name for name in stock.trained if name in wanted and name not in made.trained]
    lost += _lost_in_blocks(stock, made, origin, product, wanted)
    lost = list(dict.fromkeys(lost))
    if not lost:
        return None
    text = f"{len(lost)} parameters get no gradient any more, as {lost[0]}"
    return Disagreement(text, places=tuple(dict.fromkeys(n.rpartition(".")[0] for n in lost)))


def _lost_in_blocks(
    stock: Behaviour,
    made: Behaviour,
    origin: Origin,
    product: nn.Module,
    wanted: Iterable[str],
) -> list[str]:
    """The parameters of blocks that get no gradient, though what they stand for did."""
    trained = {owner for name in stock.trained for owner in ancestors(name)}
    blocks = [p for p, m in product.named_modules() if isinstance(m, ConvBlock)]
    lost = []
    for block in blocks:
        # A linearized block is new, beside the layers that it took from its owner.
        stands_for = block if block in origin.paths else block.rpartition(".")[0]
        if stands_for in trained:
            lost += [n for n in wanted if n.startswith(f"{block}.") and n not in made.trained]
    return lost


def _strange(origin: Origin, made: Behaviour, count: int) -> Disagreement:
    """Tensors that a step would give gradients and that no optimizer has; whose they were."""
    places = {}
    for name, parameter in origin.parameters:
        value = parameter.detach()
        if any(s.shape == value.shape and torch.equal(s, value.to(s)) for s in made.strangers):
            places[name.rpartition(".")[0]] = name
    what = f", as what was {next(iter(places.values()))}" if places else ""
    text = f"{count} tensors would be trained that are no parameters of the model{what}"
    return Disagreement(text, places=tuple(places))
