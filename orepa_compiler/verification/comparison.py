"""One output of one batch, held against the truth: how far off it is, and whether that is too far.

error     = max |candidate - truth| / max |truth|
noise     = max |reference - truth| / max |truth|, of the reference in the working precision
tolerance = NOISE_FACTOR * max(noise, eps), and never above MAX_TOLERANCE
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orepa_compiler.verification.nesting import is_comparable, kind_of, nonfinite_counts
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


@dataclass(frozen=True)
class Comparison:
    """One output of one batch, from every side.

    truth: in float64. noisy: the reference's values in the dtype `working`, once or more; none
    where there is no module to measure noise on. noise_scale: what the measured noise is multiplied
    by. precision: the dtype that was asked for, if any. origins: by role, the first module whose
    output is not finite.
    """

    name: str
    batch: int
    reference: Any
    candidate: Any
    truth: Any
    noisy: tuple[Any, ...]
    working: torch.dtype
    noise_scale: float
    precision: torch.dtype | None
    origins: dict[str, str]
    factor: float

    def row(
        self,
        reason: str,
        *,
        error: float | None = None,
        noise: float | None = None,
        tolerance: float | None = None,
        top1: float | None = None,
    ) -> Row:
        is_tensor = isinstance(self.reference, Tensor)
        shape = tuple(self.reference.shape) if is_tensor else ()
        dtype = short(self.reference.dtype) if is_tensor else kind_of(self.reference)
        return Row(self.name, self.batch, shape, dtype, error, noise, tolerance, top1, reason)


def compare(output: Comparison) -> Row:
    """The row of one output: the first thing that is wrong with it, or none."""
    reason = _kinds(output) or _shapes(output) or _values(output)
    return output.row(reason) if reason else _measure(output)


def unfit(output: Comparison) -> str:
    """Why the reference itself gives nothing to compare with here; "" where it does."""
    values = (output.reference, output.truth, *output.noisy)
    if not all(is_comparable(leaf) for leaf in values):
        return ""
    if any(leaf.shape != output.reference.shape for leaf in values):
        return "the reference's own shape depends on rounding there"
    if any(nonfinite_counts(leaf) for leaf in values):
        return f"the reference itself is not finite there in {short(output.working)}"
    if not (output.reference.is_floating_point() and output.reference.numel()):
        return ""
    truth = _wide(output.truth)
    noise = max((_distance(_wide(v), truth, False) for v in output.noisy), default=0.0)
    return _too_noisy(noise * output.noise_scale / size_of(truth), output.working)


def short(dtype: torch.dtype) -> str:
    """float32, for torch.float32."""
    return str(dtype).removeprefix("torch.")


def size_of(truth: Tensor) -> float:
    """What errors are relative to: the largest value of the truth; 1 where that is 0."""
    return float(truth.abs().max()) or 1.0


def _kinds(output: Comparison) -> str:
    for role, leaf in (("reference", output.reference), ("candidate", output.candidate)):
        if not is_comparable(leaf):
            what = (
                f"{leaf.layout} or quantized tensor" if isinstance(leaf, Tensor) else kind_of(leaf)
            )
            return f"the {role} returned a {what}, which cannot be compared; return dense tensors"
    reference, candidate = output.reference.dtype, output.candidate.dtype
    allowed = {reference}
    if output.precision and reference.is_floating_point:
        allowed.add(output.precision)
    if candidate in allowed:
        return ""
    wanted = " or ".join(sorted(short(dtype) for dtype in allowed))
    hint = "" if output.precision else "; precision= says where another one is wanted"
    return f"dtype {short(candidate)} where {wanted} is due{hint}"


def _shapes(output: Comparison) -> str:
    shape, other = tuple(output.reference.shape), tuple(output.candidate.shape)
    if shape != other:
        return f"shape {other}, the reference's is {shape}"
    if not output.reference.numel():
        return f"nothing to compare: shape {shape} holds no value"
    for values in (output.truth, *output.noisy):
        if not isinstance(values, Tensor) or tuple(values.shape) != shape:
            found = tuple(values.shape) if isinstance(values, Tensor) else kind_of(values)
            return (
                f"shape {shape}, but {found} when the same model runs in another precision: what "
                f"rounding decides cannot be compared. Compare the values that it is decided on"
            )
    return ""


def _values(output: Comparison) -> str:
    for role, values in (
        ("reference", output.reference),
        ("candidate", output.candidate),
        ("truth in float64", output.truth),
        *((f"truth in {short(output.working)}", values) for values in output.noisy),
    ):
        counts = nonfinite_counts(values)
        if counts:
            found = " and ".join(f"{count} {word}" for word, count in counts.items())
            origin = output.origins.get(role, "")
            first = f"; first not finite: {origin}" if origin else ""
            return f"the {role} is not finite: {found} in {values.numel()} values{first}"
    return ""


def _measure(output: Comparison) -> Row:
    truth, values = _wide(output.truth), _wide(output.candidate)
    is_exact = not (output.reference.is_floating_point() or output.reference.is_complex())
    size = 1.0 if is_exact else size_of(truth)
    distances = [_distance(_wide(noisy), truth, is_exact) / size for noisy in output.noisy]
    noise = max(distances, default=0.0) * output.noise_scale
    floor = 0.0 if is_exact or not truth.abs().max() else _floor(output)
    base = max(noise, floor)
    error = _distance(values, truth, is_exact) / size
    tolerance = min(output.factor * base, MAX_TOLERANCE)
    agreement, margin = (None, 0.0) if is_exact else _top1(values, truth)
    own_error = _distance(_wide(output.reference), truth, is_exact) / size
    reason = (
        _too_noisy(noise, output.working)
        or _constant(values, truth, 2 * base * size)
        or _too_far(error, tolerance, values, truth)
        or _wrong_class(agreement, margin / size, tolerance)
        or _reference_off(own_error, tolerance)
    )
    measured = noise if output.noisy else None
    return output.row(reason, error=error, noise=measured, tolerance=tolerance, top1=agreement)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _distance(values: Tensor, truth: Tensor, is_exact: bool) -> float:
    if is_exact:
        return float((values != truth).double().mean())
    return float((values - truth).abs().max())


def _floor(output: Comparison) -> float:
    dtype = output.precision or output.reference.dtype
    if output.noisy:
        return EPS_FLOOR * torch.finfo(dtype).eps
    return UNMEASURED_NOISE.get(dtype, 4 * torch.finfo(dtype).eps)


def _top1(values: Tensor, truth: Tensor) -> tuple[float | None, float]:
    """How often the top-1 along axis 1 is the truth's, and the truth's widest margin where not."""
    if values.ndim < 2 or values.shape[1] < 2 or values.is_complex():
        return None, 0.0
    chosen = values.argmax(1, keepdim=True)
    margins = truth.amax(1, keepdim=True) - truth.gather(1, chosen)
    # An equally good choice is no disagreement: its margin is 0.
    return float((margins == 0).double().mean()), float(margins.max())


def _too_noisy(noise: float, working: torch.dtype) -> str:
    if noise <= MAX_TOLERANCE:
        return ""
    return (
        f"the reference's own error in {short(working)} is {noise:.1e} of the output's size, above "
        f"{MAX_TOLERANCE:g}: no verdict; compare in a higher precision or on more inputs"
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
