"""Certifies a collapse: block by block, one conv computes what the branches did.

Two statements for each block, and together they leave no room for a wrong weight:

    max |conv_64(x) - branches_64(x)| / max |branches_64(x)|  <=  LIMIT      in float64
    W_deploy == cast(W_64),  b_deploy == cast(b_64)                          bit by bit

And two of the forward that runs, since a block may be right and stand where nothing calls it:

    max |collapsed_64(x) - model_64(x)| / max |model_64(x)|   <=  WHOLE      in float64
    each block of the deployed model runs as often as the layers that it replaces
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from orepa_compiler.files.schemas import read_json

# The most that composing kernels in another order may change in float64: 4,500 eps. The blocks of
# thirty models came to 6e-15 at most.
LIMIT = 1e-12

# The same for a whole net: roundings of all its layers, one behind the other. And the most by which
# rounding the weights of a right collapse may move its outputs.
WHOLE = 1e-9
DEPLOYED = 0.1

# The metadata key under which an ONNX file keeps it.
CERTIFICATE_KEY = "orepa.certificate"


@dataclass(frozen=True)
class BlockCertificate:
    """One conv of a collapsed model, beside the modules that it replaces.

    error, border, interior: relative to the largest value that the modules gave, in float64; on the
    whole feature map, on its outermost positions and on the others. None: the block did not run on
    the inputs. inexact: the first parameter that is not the float64 one, cast once; "" where all
    are. weights_before, weights_after: sha256 of all their tensors.
    """

    path: str
    before: str
    after: str
    error: float | None
    border: float | None
    interior: float | None
    inexact: str
    weights_before: str
    weights_after: str

    @property
    def reason(self) -> str:
        """Says why the block is not certified; "" where it is."""
        if self.error is None:
            return f"{self.path}: did not run on these inputs, so nothing was compared"
        if not self.error <= LIMIT:  # NaN too
            where = ""
            if self.border is not None and self.interior is not None:
                where = f" (border {self.border:.1e}, interior {self.interior:.1e})"
            return (
                f"{self.path}: {self.after} differs by {self.error:.1e} from {self.before} in "
                f"float64{where}, above {LIMIT:g}"
            )
        if self.inexact:
            return f"{self.inexact}: is not the float64 value of {self.before}, cast once"
        return ""


@dataclass(frozen=True)
class ForwardCertificate:
    """The forward of a collapsed model as it runs, beside that of the model.

    error: of the collapse in float64, relative to the largest value of an output. deployed: of the
    deployed model, whose weights are rounded, run in float64. stale: the first block that ran less
    often than the layers that it replaces; "" where there is none.
    """

    error: float
    deployed: float
    stale: str = ""

    @property
    def reason(self) -> str:
        """Says why the forward is not certified; "" where it is."""
        if self.stale:
            return (
                f"{self.stale}: the deployed forward does not run it each time; it reaches the "
                "layer that was there before by another way than its name"
            )
        if not self.error <= WHOLE:  # NaN too
            return (
                f"the forward differs by {self.error:.1e} from the model's in float64, above "
                f"{WHOLE:g}"
            )
        if not self.deployed <= DEPLOYED:
            return (
                f"the deployed forward differs by {self.deployed:.1e} from the model's in float64"
            )
        return ""


@dataclass(frozen=True)
class Certificate:
    """All blocks of a collapse; truthy only when there is at least one and each is certified.

    forward: of the whole model; None in a file of an earlier version.
    """

    blocks: tuple[BlockCertificate, ...]
    forward: ForwardCertificate | None = None

    def __bool__(self) -> bool:
        is_right = self.forward is None or not self.forward.reason
        return bool(self.blocks) and is_right and not any(block.reason for block in self.blocks)

    @property
    def verdict(self) -> str:
        """Says in one line how many blocks, and the worst of them or the first that fails."""
        if not self.blocks:
            return "NOT CERTIFIED: the collapse changed nothing, so there is no block to certify"
        reasons = [block.reason for block in self.blocks if block.reason]
        if reasons:
            return f"NOT CERTIFIED: {len(reasons)} of {len(self.blocks)} blocks; {reasons[0]}"
        if self.forward is not None and self.forward.reason:
            return f"NOT CERTIFIED: {self.forward.reason}"
        worst = max(self.blocks, key=lambda block: block.error or 0.0)
        whole = "" if self.forward is None else f"; the whole forward's is {self.forward.error:.1e}"
        return (
            f"certified: {len(self.blocks)} blocks; the worst float64 error is "
            f"{worst.error:.1e} ({worst.path}), and every weight is its float64 value, cast once"
            f"{whole}"
        )

    def __str__(self) -> str:
        return self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values that json.dumps takes."""
        blocks = [{**asdict(block), "reason": block.reason} for block in self.blocks]
        forward = self.forward and {**asdict(self.forward), "reason": self.forward.reason}
        return {
            "ok": bool(self),
            "verdict": self.verdict,
            "limit": LIMIT,
            "blocks": blocks,
            "forward": forward,
        }

    def to_json(self) -> str:
        """Writes what an ONNX file keeps under orepa.certificate."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Reads the certificate that to_json wrote. Raises ReparamError for anything else."""
        what = "this is not a certificate"
        if text.lstrip().startswith("["):  # of an earlier version, which knew no forward
            return cls(tuple(read_json(text, list[BlockCertificate], what=what)))
        return read_json(text, cls, what=what)
