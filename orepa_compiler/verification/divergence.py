"""Finds the first module whose output is wrong, and where on its feature map it is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional

from orepa_compiler.verification.evaluation import Batch
from orepa_compiler.verification.nesting import is_comparable
from orepa_compiler.verification.outputs.comparison import Comparison, compare, magnitude_of

# The largest picture: two rows of a terminal's line, and no more columns than it has.
MAP_ROWS, MAP_COLUMNS = 32, 64

_SHADES = 24  # of grey in the 256 colours of a terminal, from 232 on
_RAMP = " .:-=+*#%@"


@dataclass(frozen=True)
class Tap:
    """What one module gave, in the order in which modules finish.

    truth: in float64; noisy: the reference in the working precision, None where there is no module
    to measure noise on; found: the candidate's.
    """

    path: str
    kind: str
    truth: Tensor
    noisy: Tensor | None
    found: Tensor


@dataclass(frozen=True)
class Divergence:
    """The first module whose output is farther from the truth than rounding explains.

    error, tolerance: as in a Row; None where the output is not comparable at all (NaN, a shape).
    border, interior: the error on the outermost positions of the feature map, and on all others;
    None without a feature map. agreeing: how many modules before it agree. error_map: the largest
    error at each position, over samples and channels, in rows from top to bottom, relative to the
    largest value of the truth; coarser than the feature map where that is large. note: what cannot
    be told.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    reason: str
    agreeing: int
    error: float | None = None
    tolerance: float | None = None
    border: float | None = None
    interior: float | None = None
    error_map: tuple[tuple[float, ...], ...] = ()
    note: str = ""

    def __str__(self) -> str:
        where = f"{self.module or '(the model itself)'} ({self.kind})"
        text = f"first diverging module: {where}: {self.reason}"
        if self.border is not None and self.interior is not None:
            text += f"; border {self.border:.1e}, interior {self.interior:.1e}"
            text += f" ({_side(self.border, self.interior, self.tolerance)})"
        text += f". {self.agreeing} modules before it agree"
        return f"{text}. {self.note}" if self.note else text

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes."""
        data = asdict(self)
        return {
            **data,
            "shape": list(self.shape),
            "error_map": [[_finite(value) for value in row] for row in self.error_map],
        }


def first_divergence(taps: Iterable[Tap], factor: float) -> Divergence | None:
    """The first tap whose error is above its tolerance, the rule being that of a verdict."""
    agreeing = 0
    for tap in taps:
        row = compare(_comparison(tap, factor))
        if row.ok:
            agreeing += 1
            continue
        same = tap.found.shape == tap.truth.shape and is_comparable(tap.found)
        border, interior = _split(tap) if same else (None, None)
        return Divergence(
            tap.path,
            tap.kind,
            tuple(tap.truth.shape),
            row.reason,
            agreeing,
            row.error,
            row.tolerance,
            border,
            interior,
            _error_map(tap) if same else (),
        )
    return None


def module_outputs(module: nn.Module, batch: Batch) -> dict[str, tuple[str, Tensor]]:
    """By path, the type and output of every module that gave one tensor, once, in that order."""
    found: dict[str, tuple[str, Tensor]] = {}
    calls: dict[str, int] = {}
    handles = []

    def watch(path: str) -> Any:
        def after(child: nn.Module, inputs: Any, output: Any) -> None:
            calls[path] = calls.get(path, 0) + 1
            if isinstance(output, Tensor):
                # Copied at once: the next layer may work in place.
                found[path] = (type(child).__name__, output.detach().to("cpu", copy=True))

        return after

    for path, child in module.named_modules():
        handles.append(child.register_forward_hook(watch(path)))
    try:
        with torch.no_grad():
            module(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: value for path, value in found.items() if calls[path] == 1}


def half_blocks(error_map: Sequence[Sequence[float]]) -> Text:
    """The map as two rows of pixels for each line of a terminal, bright where the error is large.

    Where there are no colours, one character for each position, from a blank to @.
    """
    peak = max((_finite(v) for row in error_map for v in row), default=0.0) or 1.0
    levels = [[_finite(value) / peak for value in row] for row in error_map]
    picture = Text()
    for upper, lower in zip(levels[::2], [*levels[1::2], []], strict=False):
        for index, level in enumerate(upper):
            below = lower[index] if lower else 0.0
            picture.append("▀", style=f"color({_grey(level)}) on color({_grey(below)})")
        picture.append("\n")
    return picture


def plain_map(error_map: Sequence[Sequence[float]]) -> str:
    """The map in plain characters, a blank where the error is 0 and @ where it is largest."""
    peak = max((_finite(v) for row in error_map for v in row), default=0.0) or 1.0
    rows = ["".join(_character(_finite(v) / peak) for v in row) for row in error_map]
    width = max(map(len, rows), default=0)
    edge = f"+{'-' * width}+"
    return "\n".join([edge, *(f"|{row}|" for row in rows), edge])


def _comparison(tap: Tap, factor: float) -> Comparison:
    working = tap.found.dtype if tap.noisy is None else tap.noisy.dtype
    reference = tap.truth.to(tap.found.dtype) if tap.noisy is None else tap.noisy
    noisy = () if tap.noisy is None else (tap.noisy,)
    return Comparison(
        name=tap.path,
        batch=0,
        reference=reference,
        candidate=tap.found,
        truth=tap.truth,
        noisy=noisy,
        working=working,
        precision=tap.found.dtype,
        origins={},
        factor=factor,
    )


def _split(tap: Tap) -> tuple[float | None, float | None]:
    """The error on the border of the feature map, and inside it."""
    if tap.truth.ndim < 3 or min(tap.truth.shape[2:]) < 3:
        return None, None
    errors = _errors(tap)
    inner = (slice(None),) * 2 + (slice(1, -1),) * (tap.truth.ndim - 2)
    inside = float(errors[inner].max())
    errors[inner] = 0
    return float(errors.max()), inside


def _side(border: float, interior: float, tolerance: float | None) -> str:
    limit = tolerance or 0.0
    if border > limit >= interior:
        return "at the border alone: look at the padding"
    if interior > limit >= border:
        return "in the interior alone"
    return "all over the feature map" if interior * 2 > border else "mostly at the border"


def _errors(tap: Tap) -> Tensor:
    difference = (tap.found.double() - tap.truth.double()).abs() / magnitude_of(tap.truth.double())
    return difference.nan_to_num(nan=float("inf"))


def _error_map(tap: Tap) -> tuple[tuple[float, ...], ...]:
    if tap.truth.ndim != 4:
        return ()
    largest = _errors(tap).amax((0, 1))
    rows, columns = min(MAP_ROWS, largest.shape[0]), min(MAP_COLUMNS, largest.shape[1])
    coarse = functional.adaptive_max_pool2d(largest[None].nan_to_num(posinf=1e300), (rows, columns))
    return tuple(tuple(row) for row in coarse[0].tolist())


def _finite(value: float) -> float:
    return min(value, 1e300)


def _grey(level: float) -> int:
    return 232 + min(_SHADES - 1, int(level * _SHADES))


def _character(level: float) -> str:
    if level <= 0:
        return _RAMP[0]
    return _RAMP[max(1, min(len(_RAMP) - 1, int(level * len(_RAMP))))]


def taps_of(
    exact: dict[str, tuple[str, Tensor]],
    noisy: dict[str, tuple[str, Tensor]],
    found: dict[str, Tensor],
) -> Iterator[Tap]:
    """Every module that all three know, in the order in which the first one finished them."""
    for path, (kind, truth) in exact.items():
        if path in found and truth.is_floating_point() and truth.numel():
            other = noisy.get(path)
            yield Tap(path, kind, truth, other[1] if other else None, found[path])
