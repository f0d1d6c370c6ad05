"""Tells what a comparison that passes could not have seen, given inputs and tolerances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from orepa_compiler.verification.verdict import Row

# A channel of fewer values can be small by chance, as one logit of a thousand is.
LEAST_VALUES = 64


def blind_spots(compared: Sequence[tuple[Row, Tensor]]) -> Iterator[str]:
    """One note for each output that the inputs and tolerances leave partly unseen.

    compared: every row that came to numbers, with its truth.
    """
    for name in dict.fromkeys(row.name for row, _ in compared):
        pairs = [(row, truth) for row, truth in compared if row.name == name]
        # The absolute error that passes, of each batch.
        limits = [(row.tolerance or 0.0) * float(truth.abs().max()) for row, truth in pairs]
        truths = [truth for _, truth in pairs]
        if not any(bool(truth.any()) for truth in truths):
            yield f"{name} is 0 everywhere in the truth: nothing else was compared"
        else:
            yield from _faint_channels(name, truths, limits)
            yield from _same_for_all(name, truths, max(limits))


def _faint_channels(name: str, truths: list[Tensor], limits: list[float]) -> Iterator[str]:
    first = truths[0]
    widths = {truth.shape[1] if truth.ndim > 2 else 0 for truth in truths}
    if len(widths) > 1 or first.ndim < 3 or first.numel() < LEAST_VALUES * max(1, first.shape[1]):
        return
    peaks = [truth.abs().transpose(0, 1).flatten(1).amax(1) for truth in truths]
    seen = torch.stack([p > limit for p, limit in zip(peaks, limits, strict=True)]).any(0)
    alive = torch.stack(peaks).amax(0) > 0
    faint = int((alive & ~seen).sum())
    if faint:
        yield (
            f"{faint} of {len(seen)} channels of {name} are smaller than what the tolerance lets "
            f"pass: zeros would pass there too. Return quantities of different size separately"
        )


def _same_for_all(name: str, truths: list[Tensor], limit: float) -> Iterator[str]:
    samples = [sample for truth in truths if truth.ndim for sample in truth]
    alike = [sample for sample in samples if sample.shape == samples[0].shape]
    if len(alike) < 2:
        return
    spread = max(float((sample - alike[0]).abs().max()) for sample in alike[1:])
    if spread <= limit:
        yield (
            f"{name} differs by {spread:.1e} at most between the inputs given, and errors up to "
            f"{limit:.1e} pass: a candidate that ignores its input would pass too"
        )
