"""Finds the values on which masks and class ids are decided: comparisons and choices.

An output of 0 and 1, or of indices, has no rounding error. It is right or wrong, but where the
values that it was decided on are as near to each other as rounding is large: there both are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The scores behind a choice are kept up to this many; a sort of a long row has its square.
MOST_SCORES = 1 << 24

_COMPARES = {"gt", "lt", "ge", "le", "eq", "ne"}
_CHOOSES = {"argmax", "argmin", "max", "min", "topk", "sort"}
_JOINS = {"logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor"}
_MOVES = {
    *("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "t"),
    *("select", "slice", "expand", "flip", "roll"),
}
_KEEPS = {"_to_copy", "clone", "detach", "alias", "lift_fresh", "logical_not", "bitwise_not"}


@dataclass(frozen=True)
class Decision:
    """What an output was decided on, in float64 on the CPU.

    threshold: `on` has the output's shape, and its sign decides. choice: one more axis, the last,
    of the scores among which the output is an index. noise: of `on` in the working precision, in
    units of its largest value.
    """

    kind: Literal["threshold", "choice"]
    on: Tensor
    noise: float = 0.0

    @property
    def size(self) -> float:
        """What margins are relative to."""
        return (float(self.on.abs().max()) if self.on.numel() else 0.0) or 1.0

    def margins(self, found: Tensor, truth: Tensor) -> Tensor:
        """How clearly the truth is decided against what was found, at each place, relative.

        inf where an index that was found is none.
        """
        if self.kind == "threshold":
            return self.on.abs() / self.size
        scores = self.on.shape[-1]
        is_one = (found >= 0) & (found < scores)
        # Two scores, of which each may be off: the margin between them is halved.
        chosen, right = (
            self.on.gather(-1, index.long().clamp(0, scores - 1).unsqueeze(-1)).squeeze(-1)
            for index in (found, truth)
        )
        margins = (chosen - right).abs() / (2 * self.size)
        return margins.where(is_one, torch.tensor(torch.inf, dtype=margins.dtype))

    def with_noise(self, noisy: Sequence[Decision | None]) -> Decision | None:
        """The decision with the noise that the same one shows elsewhere; None where it is another.

        noisy: the same decision from lower precisions.
        """
        noise = 0.0
        for other in noisy:
            if other is None or other.kind != self.kind or other.on.shape != self.on.shape:
                return None
            if self.on.numel():
                noise = max(noise, float((other.on - self.on).abs().max()) / self.size)
        return replace(self, noise=noise)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Decision:
        """The decision behind the moved output."""
        if self.kind == "threshold":
            return replace(self, on=move(self.on))
        shape, scores = self.on.shape[:-1], self.on.shape[-1]
        places = move(torch.arange(prod(shape)).reshape(shape))
        return replace(self, on=self.on.reshape(-1, scores)[places])


class Deciding(TorchDispatchMode):
    """Remembers, while a model runs, what each of its masks and indices was decided on."""

    def __init__(self) -> None:
        super().__init__()
        # The tensors are held, so that no other one takes the place of one that is gone.
        self._known: dict[int, tuple[Tensor, Decision]] = {}

    def of(self, leaves: Mapping[str, Any]) -> dict[str, Decision]:
        """By name, what each leaf was decided on; those that were not are left out."""
        found = {name: self._find(leaf) for name, leaf in leaves.items()}
        return {name: decision for name, decision in found.items() if decision is not None}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        try:
            for tensor, decision in self._decided(func, args, kwargs or {}, result):
                if decision.on.numel() <= MOST_SCORES:
                    self._known[id(tensor)] = (tensor, decision)
        except RuntimeError:
            pass  # what it was decided on cannot be followed: it is not known, and asked otherwise
        return result

    def _find(self, value: Any) -> Decision | None:
        held, decision = self._known.get(id(value), (None, None))
        return decision if held is value and held is not None else None

    def _decided(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> list[tuple[Tensor, Decision]]:
        name = func.overloadpacket.__name__
        if name in _COMPARES and _is_float(*args[:2]):
            margin = _wide(args[0]) - _wide(args[1])
            return [(result, Decision("threshold", margin.expand(result.shape)))]
        if name in _CHOOSES and _is_float(args[0]):
            return _choice(func, args, kwargs, result)
        first = self._find(args[0]) if args else None
        if first is None:
            return []
        if name in _JOINS and (second := self._find(args[1])) is not None:
            return _joined(result, first, second)
        if name in _KEEPS:
            return [(result, first)]
        if name in _MOVES:
            return [(result, first.moved(lambda t: func(t, *args[1:], **kwargs)))]
        return []


def _choice(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> list[tuple[Tensor, Decision]]:
    indices = result if isinstance(result, Tensor) else result[1] if len(result) > 1 else None
    named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    dim = named.get("dim", defaults.get("dim"))
    if indices is None or indices.is_floating_point():
        return []
    scores = _wide(args[0])
    if dim is None:
        on = scores.flatten().expand(*indices.shape, scores.numel())
        return [(indices, Decision("choice", on))]
    on = scores.movedim(dim, -1)
    if indices.ndim == scores.ndim:  # with the axis kept, or one rank after the other along it
        on = on.unsqueeze(dim % scores.ndim).expand(*indices.shape, scores.shape[dim])
    if prod(on.shape) > MOST_SCORES:
        return []
    return [(indices, Decision("choice", on))]


def _joined(result: Tensor, first: Decision, second: Decision) -> list[tuple[Tensor, Decision]]:
    """Of two masks, the nearer decision: the joint one can turn where either does."""
    if (first.kind, second.kind) != ("threshold", "threshold"):
        return []
    # Each in units of its own size, for they are of different quantities.
    margins = [part.on.abs() / (float(part.on.abs().max()) or 1.0) for part in (first, second)]
    return [(result, Decision("threshold", torch.minimum(*margins).expand(result.shape)))]


def _is_float(*values: Any) -> bool:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return any(tensor.is_floating_point() for tensor in tensors)


def _wide(value: Any) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensor.detach().to("cpu", torch.float64)
