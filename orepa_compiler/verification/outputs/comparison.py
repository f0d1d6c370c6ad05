"""Holds one output of one batch against the truth: the first thing that is wrong with it."""

from __future__ import annotations

from torch import Tensor

from orepa_compiler.verification.nesting import is_comparable, kind_name, nonfinite_counts
from orepa_compiler.verification.outputs.compared_output import (
    Comparison,
    magnitude_of,
    short,
    wide,
)
from orepa_compiler.verification.outputs.deciding import decide
from orepa_compiler.verification.outputs.rounding import measure, noise_of, too_noisy
from orepa_compiler.verification.verdict import Row

__all__ = ["Comparison", "compare", "magnitude_of", "short", "unfit"]


def compare(output: Comparison) -> Row:
    """The row of one output: the first thing that is wrong with it, or none."""
    reason = _kinds(output) or _shapes(output) or _values(output)
    if reason:
        return output.row(reason)
    return measure(output) if is_rounded(output) else decide(output)


def is_rounded(output: Comparison) -> bool:
    """Whether rounding moves the output a little; a mask or an index it leaves, or turns over."""
    dtype = output.reference.dtype
    return output.decision is None and (dtype.is_floating_point or dtype.is_complex)


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
    if not is_rounded(output):
        return ""
    truth = wide(output.truth)
    return too_noisy(noise_of(output, truth, magnitude_of(truth)), output)


def _kinds(output: Comparison) -> str:
    for role, leaf in (("reference", output.reference), ("candidate", output.candidate)):
        if not is_comparable(leaf):
            what = (
                f"{leaf.layout} or quantized tensor"
                if isinstance(leaf, Tensor)
                else kind_name(leaf)
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
            found = tuple(values.shape) if isinstance(values, Tensor) else kind_name(values)
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
