"""Tells whether tensors are what they were, by what torch counts of a change."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Stamp:
    """Which tensors, where in memory, after how many edits: what torch counts of a change.

    The memory is held weakly, so that no other may take its place unseen. A weak reference to the
    tensors themselves would forbid torch to swap them (torch.utils.swap_tensors), as model.to()
    and load_state_dict do where set_swap_module_params_on_conversion is set.

    It does not see an edit through .data or NumPy, or one by a fused optimizer.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._places = [_place(tensor) for tensor in tensors]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        return (
            len(tensors) == len(self._memory)
            and not any(memory.expired() for memory in self._memory)
            and [_place(tensor) for tensor in tensors] == self._places
        )


def _place(tensor: Tensor) -> tuple[object, ...]:
    memory = tensor.untyped_storage()._cdata
    return (
        *(id(tensor), memory, tensor.data_ptr(), tensor._version),
        *(tensor.dtype, tensor.shape, tensor.stride()),
    )
