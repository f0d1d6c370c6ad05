"""Says of torch's functions, by their names, what they read, write over and draw: the one table.

What a schema truly says is taken from it. By hand is left: attributes, which have no schema; the
operators of Python; and functions that are written in Python, under names of their own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

# What follows from a tensor's shape, dtype and device, which no rewrite changes.
OF_SHAPE = frozenset({
    "shape", "dtype", "device", "ndim", "size", "dim", "ndimension", "numel", "nelement", "__len__",
    "is_floating_point", "is_complex", "element_size", "itemsize", "is_cuda", "is_cpu", "is_meta",
    "get_device",
})  # fmt: skip
# What is read of a tensor and tells nothing of its values. Beside the shape it is how it lies in
# memory and stands in a graph of gradients, which a rewritten layer may do in another way.
OF_FORM = OF_SHAPE | {
    "layout", "stride", "is_contiguous", "storage_offset", "names", "is_sparse", "is_quantized",
    "is_mkldnn", "is_nested", "is_tensor", "requires_grad", "is_leaf", "grad_fn", "is_inference",
    "_version",
}  # fmt: skip
# The operators of Python that write over their first operand: these have no schema.
_WRITING = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip
# In names of functions written in Python that draw (dropout2d), and of no operator that does not.
_DRAWING = ("rand", "dropout", "bernoulli", "normal_", "multinomial", "gumbel")


def writes(name: str) -> bool:
    """Whether a function or method writes over its first operand: mul_, __setitem__, __iadd__.

    The underscore says of every operator what its schema does; a test compares the two.
    """
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))


@cache
def draws(name: str) -> bool:
    """Whether a function or method may draw random numbers."""
    if any(word in name for word in _DRAWING):
        return True
    return any(torch.Tag.nondeterministic_seeded in each.tags for each in overloads(name))


def overloads(name: str) -> list[Any]:
    """Gives the operators of torch that have this name, none where it is a function of Python's."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    return [getattr(packet, each) for each in packet.overloads()]
