"""How many operations a step launches, counted exactly and without a GPU.

On a GPU a small net waits for launches and not for arithmetic. The step runs on the meta device,
where no arithmetic is done and kernels go through whole, as they do on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step.variants import Stepper

# They give memory, or mark a place for the profiler.
_LAUNCH_NOTHING = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_record_function_enter_new", "_record_function_exit"),
)


class OperationCount(TorchDispatchMode):
    """Counts what is dispatched inside: no views, which launch nothing.

    One over lists of tensors (`_foreach_`) is one where a GPU makes it one, which asks that the
    tensors of a place have one shape and one layout; else it is one for each place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not _is_view(func) and name not in _LAUNCH_NOTHING:
            lists = [given for given in args if isinstance(given, (list, tuple))]
            fused = not name.startswith("_foreach") or _is_fused(lists)
            self.counts[name] += 1 if fused else len(lists[0])
        return func(*args, **(kwargs or {}))


def operations(model: str, name: str, *, batch: int = 2, size: int = 64) -> int:
    """What one step of a variant launches: forward, backward and optimizer, as on a GPU.

    What is compiled cannot be counted so. The count depends on neither the batch nor the size.
    """
    stepper = Stepper(name, model, batch=batch, size=size, device="meta", amp=False)
    stepper.step()  # the optimizer makes its momentum, and constants are made, in the first
    with OperationCount() as count:
        stepper.step()
    return count.total


def _is_view(func: Any) -> bool:
    """Whether it gives back memory of what came in, which it does not write to."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _is_fused(lists: Sequence[Sequence[Any]]) -> bool:
    tensors = [own for own in lists if all(isinstance(t, Tensor) for t in own)]
    return all(_are_alike(place) for place in zip(*tensors, strict=True))


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    is_dense = is_non_overlapping_and_dense_or_false(first)
    return is_dense and all(
        t.shape == first.shape and t.stride() == first.stride() for t in tensors
    )
