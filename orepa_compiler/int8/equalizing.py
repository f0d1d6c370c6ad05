"""equalize: another form of a net, equal bit by bit, whose maps int8 can hold better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import capture
from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.int8.ranges import input_peaks
from orepa_compiler.passes import is_leaf
from orepa_compiler.preconditions import check_inputs, check_model, check_unrounded
from orepa_compiler.quantization.pairs import Pair, pairs
from orepa_compiler.verification.evaluation import Batch, Side, batches_of, evaluate


@torch.no_grad()
def equalize(model: nn.Module, inputs: Any, *, inplace: bool = False) -> nn.Module:
    """Makes the channels between a collapsed model's layers more equal, for int8.

        deploy = orepa.equalize(orepa.collapse(model), images)

    W_1' = diag(1/s) W_1,  b_1' = b_1 / s,  W_2' = W_2 diag(s),  s_i = sqrt(a_i / c_i)

    a_i: the largest magnitude of channel i on the inputs; c_i: that of the weights which read it.
    Between layers whose map alone the second reads, behind ReLU or another f(t y) = t f(y), the net
    stays the same (Nagel et al. 2019, Sec. 4.1). s is rounded to a power of two, so that floating
    point keeps every bit; that is checked on the inputs, in float64.

    inputs: a batch, or a list of them, of real data.
    Raises ReparamError for a model in training form or that rounds to int8, where no two layers are
    so, and where an output is not what it was.
    """
    check_model(model, also_linear=True)
    check_unrounded(model, "equalize")
    check_inputs(inputs)
    blocks = [path for path, module in model.named_modules() if isinstance(module, ConvBlock)]
    if blocks:
        raise ReparamError(
            "still in training form; call orepa.collapse(model) first", path=blocks[0]
        )
    found = list(pairs(capture(model, training=False, is_leaf=is_leaf)))
    if not found:
        raise ReparamError(
            f"{type(model).__name__} has no two layers with only ReLU, pooling or the like between "
            "them, so there is nothing to equalize"
        )
    batches = batches_of(inputs)
    target = model if inplace else value_copy(model)
    before = _outputs(model, batches)
    peaks = input_peaks(model, batches)
    for pair in found:
        if pair.second in peaks:
            _equalize(target, pair, peaks)
    _check_equal(before, _outputs(target, batches))
    return target


def _equalize(model: nn.Module, pair: Pair, peaks: Mapping[str, Tensor]) -> None:
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    factor = _factor(peaks[pair.second], second)
    _set(first, conv_operator(first).scale(1 / factor))
    reading = conv_operator(second)
    scaling = identity(len(factor), reading.rank, like=factor).scale(factor)
    # padded zeros are zeros in either form, so what stands at the border is no matter
    inside = replace(reading, bias=None, padding=())
    made = (inside @ scaling).weight
    _set(second, replace(reading, weight=made))


def _factor(peak: Tensor, reader: nn.Module) -> Tensor:
    """Computes s, (C,), powers of two; 1 where a channel, or what reads it, is zero."""
    kernel = reader.weight
    assert isinstance(kernel, Tensor)
    groups = int(getattr(reader, "groups", 1))
    # (groups, C_out / groups, C_in / groups, taps): the largest weight on each input channel
    split = kernel.detach().reshape(groups, -1, *kernel.shape[1:2], kernel[0, 0].numel())
    ratio = peak.to(kernel) / split.abs().amax((1, 3)).flatten()
    exponent = (ratio.log2() / 2).round()
    return torch.exp2(torch.where(exponent.isfinite(), exponent, 0.0))


def _set(layer: nn.Module, operator: ConvOperator) -> None:
    for name, value in (("weight", operator.weight), ("bias", operator.bias)):
        own = getattr(layer, name)
        if own is not None:
            assert value is not None
            own.copy_(value.reshape(own.shape))


def _outputs(model: nn.Module, batches: list[Batch]) -> list[dict[str, Any]]:
    side = Side("model in float64", value_copy(model).double().eval(), torch.float64)
    return [outputs.leaves for outputs in evaluate(side, batches)]


def _check_equal(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        for name, value in old.items():
            if isinstance(value, Tensor) and not torch.equal(value, new[name]):
                error = (value.double() - new[name].double()).abs().max().item()
                raise ReparamError(
                    f"the equalized model gives another {name} on batch {index} (off by "
                    f"{error:.1e} in float64), so it is not handed out; something between its "
                    "layers does not scale with its input"
                )
