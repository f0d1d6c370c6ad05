"""The convs and norms that run in a forward, and what they cost: seen in the run, not in a plan.

Convs and norms that are called as functions count like layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_CONVS = {torch.ops.aten.convolution, torch.ops.aten._convolution}
_LINEAR = {torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.linear}
_NORMS = {
    torch.ops.aten.native_batch_norm,
    torch.ops.aten._native_batch_norm_legit_no_training,
    torch.ops.aten._native_batch_norm_legit,
    torch.ops.aten.cudnn_batch_norm,
    torch.ops.aten.batch_norm,
}
_VIEWS = {torch.ops.aten.view, torch.ops.aten._unsafe_view, torch.ops.aten.reshape}


@dataclass(frozen=True)
class Counts:
    """Of one image. behind: norms that alone read what a conv or a linear layer gives."""

    convs: int
    macs: int
    norms: int
    behind: int


@dataclass
class _Counter(TorchDispatchMode):
    convs: int = 0
    macs: int = 0
    norms: list[int] = field(default_factory=list)
    made: set[int] = field(default_factory=set)
    uses: dict[int, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # alive, so that no two share an id

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        op, first = func.overloadpacket, args[0] if args else None
        read = [x for x in args if isinstance(x, Tensor)]
        for tensor in [*read, *(t for x in args if isinstance(x, (list, tuple)) for t in x
                                if isinstance(t, Tensor))]:  # fmt: skip
            self.uses[id(tensor)] = self.uses.get(id(tensor), 0) + 1
            self.kept.append(tensor)
        if op in _CONVS:
            self.convs += 1
            self.macs += args[1].numel() * _positions(args, result)
        if op in _NORMS:
            self.norms.append(id(first))
        if isinstance(result, Tensor):
            self.kept.append(result)
            is_view = op in _VIEWS and id(first) in self.made and self.uses[id(first)] == 1
            if op in _CONVS or op in _LINEAR or is_view:
                self.made.add(id(result))
        return result


def _positions(args: tuple[Any, ...], result: Tensor) -> int:
    """Places at which the kernel is spent; a transposed conv spends it on each input position."""
    places = args[0] if args[6] else result
    return places.shape[2:].numel()


@torch.no_grad()
def counted(model: nn.Module | Callable[..., Any], inputs: tuple[Any, ...]) -> Counts:
    """What runs for the inputs."""
    with _Counter() as seen:
        model(*inputs)
    behind = [norm for norm in seen.norms if norm in seen.made and seen.uses[norm] == 1]
    return Counts(seen.convs, seen.macs, len(seen.norms), len(behind))
