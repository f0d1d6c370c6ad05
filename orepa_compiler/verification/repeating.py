"""Runs a side twice: one that does not give the same outputs has no verdict.

A reference with dropout or noise left on would raise its own tolerance, and let wrong weights pass.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.errors import NoVerdict
from orepa_compiler.verification.evaluation import Batch, Outputs, Side, evaluate
from orepa_compiler.verification.nesting import is_comparable, is_smooth, map_tensors, tensors_in
from orepa_compiler.verification.outputs.compared_output import magnitude_of, wide
from orepa_compiler.verification.outputs.rounding import least_noise


@torch.no_grad()
def refuse_restless(side: Side, batches: list[Batch], found: list[Outputs]) -> None:
    """Nothing, where the side gives on its first batch what it gave before.

    found: its outputs on all batches. Raises NoVerdict naming the first module that does not, where
    two runs differ by more than rounding in another order comes to.
    """
    if not batches:
        return
    again = evaluate(side, batches[:1])[0]
    reason = _difference(found[0], again)
    if not reason:
        return
    culprit = _first_restless(side, batches[0]) if isinstance(side.run, nn.Module) else ""
    first = f"; the first module that does so is {culprit}" if culprit else ""
    raise NoVerdict(
        f"no verdict: the {side.role}, called twice on the same inputs, gives other outputs "
        f"({reason}){first}. Switch off what is random, or what it keeps from call to call"
    )


def _difference(before: Outputs, after: Outputs) -> str:
    if before.leaves.keys() != after.leaves.keys():
        return f"{', '.join(before.leaves) or 'none'}, then {', '.join(after.leaves) or 'none'}"
    for name, old in before.leaves.items():
        new = after.leaves[name]
        if not (is_comparable(old) and is_comparable(new)):
            continue
        if old.shape != new.shape or old.dtype != new.dtype:
            return f"{name} has shape {tuple(old.shape)}, then {tuple(new.shape)}"
        if not is_smooth(old):
            if count := int((old != new).sum()):
                return f"{name} differs in {count} of {old.numel()} values"
        elif (error := _relative(old, new)) > least_noise(old.dtype):
            return f"{name} differs by {error:.1e} of its size"
    return ""


def _relative(old: Tensor, new: Tensor) -> float:
    # NaN and inf are told elsewhere, where both runs have them.
    before, after = (
        wide(value).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for value in (old, new)
    )
    if not before.numel():
        return 0.0
    return float((after - before).abs().max()) / magnitude_of(before)


def _first_restless(side: Side, batch: Batch) -> str:
    """The first module, in the order they finish, of equal inputs and other outputs."""
    assert isinstance(side.run, nn.Module)
    first, second = (_trail(side.run, map_tensors(batch, torch.clone)) for _ in range(2))
    for (path, inputs, outputs), (other, same, others) in zip(first, second, strict=False):
        if path == other and inputs == same and outputs != others:
            kind = type(side.run.get_submodule(path)).__name__
            return f"{path or 'the model itself'} ({kind})"
    return ""


def _trail(module: nn.Module, batch: Batch) -> list[tuple[str, bytes, bytes]]:
    """The calls of all modules as they end, each with digests of its inputs and its outputs."""
    trail: list[tuple[str, bytes, bytes]] = []
    begun: dict[str, list[bytes]] = {}

    def watch(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(child: nn.Module, args: Any, kwargs: Any) -> None:
            begun.setdefault(path, []).append(_digest((args, kwargs)))

        def after(child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            trail.append((path, begun[path].pop(), _digest(output)))

        return before, after

    handles = []
    for path, child in module.named_modules():
        before, after = watch(path)
        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(child.register_forward_hook(after, with_kwargs=True))
    try:
        module(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return trail


def _digest(value: Any) -> bytes:
    digest = blake2b(digest_size=16)
    for tensor in tensors_in(value):
        if is_comparable(tensor):
            # Of the values and not of the layout: an upsampling may give either.
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.digest()
