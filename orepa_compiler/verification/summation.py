"""Adds up in another order, as right candidates do: what that changes is noise, and no fault.

A norm behind a conv is added up as a fold does it, from the new bias on, and not from 0:

    scale (W x - mean) + beta    ->    scale (start + W x),    start = beta / scale - mean

The one is rounded at the size of W x, the other at that of the bias: a kernel that adds up its
terms one by one rounds each of them so. With 1152 terms, right convs came to 5 times the noise of
a forward that begins at 0.

A mean over a map is added up by a few running sums. torch adds up in pairs, so its error hardly
grows with the map; an engine's loop rounds at the size of the sum each time. On 112 x 112 equal
values the right pool of onnxruntime came to 80 times the noise of torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_CONVS: tuple[Any, ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
_MEANS: tuple[Any, ...] = (torch.mean, Tensor.mean)
_POOLS: tuple[Any, ...] = (
    torch.adaptive_avg_pool1d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
)

LANES = 4  # running sums of one mean: the numbers in the smallest vectors that CPUs have
_FEW = 64  # so few terms round alike in any order
_PRECISE = (torch.float32, torch.float64)

Again = Callable[[Tensor], Tensor]


class OtherSums(TorchFunctionMode):
    """Inside it a batch norm in eval mode, right behind a conv, is added up as one conv.

    And means are added up by LANES running sums. Of float32 and float64: half precision adds up
    in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        # What a conv gave -> the conv once more, from another number on.
        self.made = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if func is F.batch_norm and (folded := self._folded(*args, **named)) is not None:
            return folded
        output = func(*args, **named)
        if func in _MEANS or func in _POOLS:
            return _mean_again(func, output, *args, **named)
        if func in _CONVS and output.dtype in _PRECISE:
            self.made[output] = _conv_again(func, args, named)
        return output

    def _folded(
        self,
        input: Any,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        """What the norm gives, the conv before it added up anew; None of anything else."""
        again: Again | None = self.made.get(input)
        if again is None or training or running_mean is None or running_var is None:
            return None
        scale = (running_var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        if not scale.all():
            return None
        start = (0.0 if bias is None else bias / scale) - running_mean
        shape = (-1,) + (1,) * (input.ndim - 2)
        return again(start) * scale.reshape(shape)


def _conv_again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Again:
    image, weight, *rest = args if len(args) > 1 else (*args, kwargs.get("weight"))
    options = {key: value for key, value in kwargs.items() if key not in ("weight", "bias")}
    own = rest[0] if rest else kwargs.get("bias")

    def again(start: Tensor) -> Tensor:
        begin = start if own is None else own + start
        found: Tensor = func(image, weight, begin, *rest[1:], **options)
        return found

    return again


def _mean_again(func: Any, output: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The mean that gave `output`, by running sums; `output` where it has few terms, or others."""
    if x.dtype not in _PRECISE or x.dtype != output.dtype or not output.numel():
        return output
    if func in _POOLS:
        rank = int(func.__name__[-2])
        dims = tuple(range(x.ndim - rank, x.ndim))
        if any(output.shape[d] != 1 for d in dims):
            return output
    else:
        given = args[0] if args else kwargs.get("dim")
        dims = (given,) if isinstance(given, int) else tuple(given or range(x.ndim))
    terms = x.numel() // output.numel()
    if terms <= _FEW:
        return output
    last = range(-len(dims), 0)
    flat = x.movedim(dims, tuple(last)).flatten(-len(dims))
    return (_running_sum(flat) / terms).reshape(output.shape)


def _running_sum(x: Tensor) -> Tensor:
    """The sum over the last axis, by LANES running sums."""
    total, *parts = x.split(LANES, -1)
    for part in parts:
        if part.shape != total.shape:  # what is left at the end
            part = F.pad(part, (0, LANES - part.shape[-1]))
        total = total + part
    return total.sum(-1)
