"""Answers for the parameters that a block's conv had: tensors to read, and none to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from orepa_compiler.errors import ReparamError

WRITTEN = (
    "the {name} of a block is made of its branches at each call, so what is written there is lost; "
    "call orepa.collapse(model) first, and fuse or change its convs"
)

_DATA: Any = Tensor.data
_WRITING = frozenset({
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
})  # fmt: skip


class Stated(Tensor):
    """A kernel or a bias that was made just now: all that is computed with it is a plain tensor.

    To write over it raises ReparamError: the block would not see it, and code that fuses by hand
    (`conv.weight.data = ...`) would go on with half of its work done.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        written = args[0] if args and _writes(func) else kwargs.get("out")
        if isinstance(written, Stated):
            raise ReparamError(WRITTEN.format(name="weight or bias"))
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        return found.as_subclass(cls) if func == _DATA.__get__ else found


def read_only(tensor: Tensor) -> Tensor:
    """Marks a tensor that a block made: it has its gradients, and refuses to be written over."""
    return tensor.as_subclass(Stated)


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if func == _DATA.__set__ or name in _WRITING:
        return True
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
