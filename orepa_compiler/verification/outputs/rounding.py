"""Measures how far off a rounded output is, and whether that is too far.

error     = max |candidate - truth| / max |truth|
noise     = max |rounded - truth| / max |truth|, over evaluations in the working precision: the
            reference's own, and some whose weights are each rounded anew
tolerance = NOISE_FACTOR * max(noise, eps), and never above MAX_TOLERANCE
"""

from __future__ import annotations

import torch
from torch import Tensor

from orepa_compiler.verification.outputs.compared_output import Comparison, magnitude_of, wide
from orepa_compiler.verification.verdict import Row

# How much worse than the reference a right candidate may be. On models with random norms (ResNet,
# MobileNet, DenseNet, EfficientNet, RegNet, VGG and others) with 1 to 1000 outputs, folded norms,
# channels_last, onnxruntime and other CPU kernels came to 2.3 times the noise at most in float32,
# and to 1.7 times in bfloat16 and float16, also where the fold itself was done in half precision.
NOISE_FACTOR = 4.0

# The least noise that is believed, in eps of the dtype: a reference can hit the truth by luck, and
# one rounding of the largest output is half of this. The measured noise began at 0.4.
EPS_FLOOR = 1.0

# The most that a verdict may forgive: an output of zeros has error 1.
MAX_TOLERANCE = 0.1

# Where no module is there to measure it: the largest noise of those models, rounded up
# (VGG-11 in float32; ResNet-50 in half). float64 has float32's number of eps.
UNMEASURED_NOISE = {
    torch.float64: 4e-15,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


def measure(output: Comparison) -> Row:
    """The row of an output that every side has, finite and of one shape."""
    truth, values = wide(output.truth), wide(output.candidate)
    size = magnitude_of(truth)
    noise = noise_of(output, truth, size)
    base = max(noise, _floor(output) if truth.abs().max() else 0.0)
    error = distance(values, truth) / size
    tolerance = min(output.factor * base, MAX_TOLERANCE)
    agreement, margin = _top1(values, truth)
    own_error = distance(wide(output.reference), truth) / size
    reason = (
        too_noisy(noise, output)
        or _constant(values, truth, 2 * base * size)
        or _too_far(error, tolerance, values, truth)
        or _wrong_class(agreement, margin / size, tolerance)
        or _reference_off(own_error, tolerance)
    )
    measured = noise if output.noisy else None
    return output.row(reason, error=error, noise=measured, tolerance=tolerance, top1=agreement)


def noise_of(output: Comparison, truth: Tensor, size: float) -> float:
    """The largest error of the noisy evaluations, relative to the size of the output."""
    return max((distance(wide(noisy), truth) / size for noisy in output.noisy), default=0.0)


def distance(values: Tensor, truth: Tensor) -> float:
    """The largest difference."""
    return float((values - truth).abs().max())


def _floor(output: Comparison) -> float:
    dtype = output.precision or output.reference.dtype
    return EPS_FLOOR * torch.finfo(dtype).eps if output.noisy else least_noise(dtype)


def least_noise(dtype: torch.dtype) -> float:
    """The noise of a dtype that is taken where none was measured."""
    if dtype.is_complex:
        dtype = dtype.to_real()
    return UNMEASURED_NOISE.get(dtype, 4 * torch.finfo(dtype).eps)


def _top1(values: Tensor, truth: Tensor) -> tuple[float | None, float]:
    """How often the top-1 along axis 1 is the truth's, and the truth's widest margin where not."""
    if values.ndim < 2 or values.shape[1] < 2 or values.is_complex():
        return None, 0.0
    chosen = values.argmax(1, keepdim=True)
    margins = truth.amax(1, keepdim=True) - truth.gather(1, chosen)
    # An equally good choice is no disagreement: its margin is 0.
    return float((margins == 0).double().mean()), float(margins.max())


def too_noisy(noise: float, output: Comparison) -> str:
    """Why noise of this size allows no verdict; "" where it does."""
    if noise <= MAX_TOLERANCE:
        return ""
    helps = "compare in a higher precision or on more inputs"
    if output.noise_name:  # that of int8, whose ranges are the same on all inputs
        helps = "export it anew and keep its layers in float32 (keep_fp32=)"
    return (
        f"the reference's own error in {output.noise_of} is {noise:.1e} of the output's size, "
        f"above {MAX_TOLERANCE:g}: no verdict; {helps}"
    )


def _constant(values: Tensor, truth: Tensor, least: float) -> str:
    if values.is_complex() or values.numel() < 2 or values.max() > values.min():
        return ""
    low, high = float(truth.min()), float(truth.max())
    if high - low <= least:
        return ""
    return (
        f"constant {float(values.max()) + 0.0:.6g} in all {values.numel()} values, where the "
        f"reference varies from {low:.6g} to {high:.6g}"
    )


def _too_far(error: float, tolerance: float, values: Tensor, truth: Tensor) -> str:
    if error <= tolerance:
        return ""
    index = torch.unravel_index((values - truth).abs().argmax(), values.shape)
    where = tuple(int(axis) for axis in index)
    return (
        f"error {error:.1e} is above the tolerance {tolerance:.1e}; largest at {where}: "
        f"{values[index].item():.6g}, the truth is {truth[index].item():.6g}"
    )


def _wrong_class(agreement: float | None, margin: float, tolerance: float) -> str:
    if agreement is None or margin <= tolerance:
        return ""
    return (
        f"top-1 agrees at {agreement:.2%} of the positions, and these are no ties: the truth's "
        f"margin is up to {margin:.1e} of the output's size, above the tolerance {tolerance:.1e}"
    )


def _reference_off(own_error: float, tolerance: float) -> str:
    if own_error <= tolerance:
        return ""
    return (
        f"the reference itself is {own_error:.1e} from the truth, above the tolerance "
        f"{tolerance:.1e}: it is another function, or computes in a lower precision"
    )
