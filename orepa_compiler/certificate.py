"""The certificate of a collapse: block by block, that one conv computes what the branches did.

Two statements for each block, and together they leave no room for a wrong weight:

    max |conv_64(x) - branches_64(x)| / max |branches_64(x)|  <=  LIMIT      in float64
    W_deploy == cast(W_64),  b_deploy == cast(b_64)                          bit by bit

And two of the forward that runs, since a block may be right and stand where nothing calls it:

    max |collapsed_64(x) - model_64(x)| / max |model_64(x)|   <=  WHOLE      in float64
    each block of the deployed model runs as often as the layers that it replaces
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.compiler import collapsed_by
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes.collapse.folds import Fold, fold_of
from orepa_compiler.planning import Edit, Plan, recorded_plans
from orepa_compiler.preconditions import check_unrounded
from orepa_compiler.schemas import read_json
from orepa_compiler.validation.agreement import largest_error, stale_modules
from orepa_compiler.validation.behaviour import Call, behaviour
from orepa_compiler.validation.blame import place_of
from orepa_compiler.verification.comparison import size_of
from orepa_compiler.verification.evaluation import Side, batches_of, evaluate, evaluation_mode
from orepa_compiler.verification.nesting import map_tensors, named_leaves

# The most that composing kernels in another order may change in float64: 4,500 eps. The blocks of
# thirty models came to 6e-15 at most.
LIMIT = 1e-12

# The same for a whole net: roundings of all its layers, one behind the other. And the most by which
# rounding the weights of a right collapse may move its outputs.
WHOLE = 1e-9
DEPLOYED = 0.1

# The metadata key under which an ONNX file keeps it.
CERTIFICATE_KEY = "orepa.certificate"

_DIGITS = 16  # of a sha256, in what is printed and kept


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
        """Why the block is not certified; "" where it is."""
        if self.error is None:
            return f"{self.path}: did not run on these inputs: nothing was compared"
        if not self.error <= LIMIT:  # NaN too
            where = ""
            if self.border is not None and self.interior is not None:
                where = f" (border {self.border:.1e}, interior {self.interior:.1e})"
            return (
                f"{self.path}: {self.after} is {self.error:.1e} from {self.before} in float64"
                f"{where}, above {LIMIT:g}"
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
        """Why the forward is not certified; "" where it is."""
        if self.stale:
            return (
                f"{self.stale}: the deployed forward does not run it each time: it reaches what "
                "stood there by another way than its name"
            )
        if not self.error <= WHOLE:  # NaN too
            return f"the forward is {self.error:.1e} from the model's in float64, above {WHOLE:g}"
        if not self.deployed <= DEPLOYED:
            return f"the deployed forward is {self.deployed:.1e} from the model's in float64"
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
        """One line: how many blocks, and the worst of them or the first that fails."""
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
        """Plain values that json.dumps takes."""
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
        """What an ONNX file keeps under orepa.certificate."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The certificate that to_json wrote. Raises ReparamError for anything else."""
        what = "this is not a certificate"
        if text.lstrip().startswith("["):  # of an earlier version, which knew no forward
            return cls(tuple(read_json(text, list[BlockCertificate], what=what)))
        return read_json(text, cls, what=what)


def certify(model: nn.Module, deploy: nn.Module, inputs: Any) -> Certificate:
    """The certificate that `deploy` is the collapse of `model`.

    deploy: what collapse(model) returned, in any dtype. inputs: the blocks are compared on what
    reaches them when the model runs on the first batch, and so are the whole forwards.

    Raises ReparamError where deploy is not recorded as a collapse of the model, where the model
    does not run in float64, and for one that rounds to int8: its kernels are compared by verify.
    """
    check_unrounded(model, "certify")
    edits = _edits(model, deploy)
    batch = batches_of(inputs)[0]
    plan = Plan(tuple(edits))
    exact = value_copy(model).double().eval()
    if not edits:
        return Certificate(())
    try:
        # Composed once more, and not cast: what the weights were rounded from.
        precise = collapsed_by(exact, plan, _double(batch))
    except (AttributeError, ReparamError) as error:
        raise ReparamError(f"the recorded collapse does not fit the model: {error}") from error
    measured = _Measured(precise, edits)
    with evaluation_mode(exact), measured.watching(exact):
        evaluate(Side("model in float64", exact), [_double(batch)])
    blocks = tuple(_certified(edit, model, deploy, precise, measured) for edit in edits)
    return Certificate(blocks, _forward(exact, precise, deploy, edits, batch))


def _forward(
    exact: nn.Module, precise: nn.Module, deploy: nn.Module, edits: list[Edit], batch: Any
) -> ForwardCertificate:
    """The whole forwards, on one batch, and how often each block runs in them."""
    places = [place_of(edit) for edit in edits]
    models = (exact, precise, value_copy(deploy).double())
    right, collapsed, deployed = (
        behaviour(m, [batch], [Call(0, False)], dtype=torch.float64, watched=places) for m in models
    )
    errors = [
        largest_error(right.outputs[0], found.outputs[0])[0]  # type: ignore[arg-type]
        if not (right.raised or found.raised)
        else float("inf")
        for found in (collapsed, deployed)
    ]
    stale = [p for m in (collapsed, deployed) if (s := stale_modules(right, m, places))
             for p in s.places]  # fmt: skip
    return ForwardCertificate(errors[0], errors[1], next(iter(stale), ""))


def _edits(model: nn.Module, deploy: nn.Module) -> list[Edit]:
    before, after = recorded_plans(model), recorded_plans(deploy)
    plans = after[len(before) :]
    if not plans or after[: len(before)] != before or any(p != p.of("collapse") for p in plans):
        raise ReparamError(
            "deploy is not recorded as a collapse of this model; give the two sides of one "
            "orepa.collapse(model)"
        )
    return [edit for plan in plans for edit in plan.edits]


def _double(batch: Any) -> Any:
    return map_tensors(batch, lambda t: t.detach().double() if t.is_floating_point() else t)


class _Measured:
    """The errors of the blocks, measured while the model runs: no feature map is kept."""

    def __init__(self, precise: nn.Module, edits: Iterable[Edit]) -> None:
        self.precise, self.folds = precise, [fold_of(edit) for edit in edits]
        self.errors: dict[Fold, tuple[float, float | None, float | None]] = {}
        self.inputs: dict[Fold, Any] = {}
        self.handles: list[Any] = []

    def watching(self, model: nn.Module) -> _Measured:
        for fold in self.folds:
            first, last = fold.places[0], fold.places[-1]
            self.handles += [
                model.get_submodule(first).register_forward_pre_hook(self._before(fold)),
                model.get_submodule(last).register_forward_hook(self._after(fold)),
            ]
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *reason: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, fold: Fold) -> Any:
        def keep(module: nn.Module, arguments: Any) -> None:
            # A copy: a layer inside may work in place.
            self.inputs.setdefault(fold, map_tensors(arguments, Tensor.clone))

        return keep

    def _after(self, fold: Fold) -> Any:
        def compare(module: nn.Module, arguments: Any, output: Any) -> None:
            if fold not in self.errors and fold in self.inputs:
                found = _run(self.precise, fold, self.inputs.pop(fold))
                self.errors[fold] = _error(named_leaves(output), named_leaves(found))

        return compare


def _run(precise: nn.Module, fold: Fold, arguments: Any) -> Any:
    value = arguments
    for path in fold.places:
        result = precise.get_submodule(path)(*value)
        value = (result,)
    return result


def _error(
    expected: dict[str, Any], found: dict[str, Any]
) -> tuple[float, float | None, float | None]:
    """The largest error of all outputs, on the border and inside where there is a map."""
    error, border, interior = 0.0, None, None
    if not expected or expected.keys() != found.keys():
        return float("inf"), None, None
    for name, right in expected.items():
        if right.numel() != found[name].numel():
            return float("inf"), None, None
        # Tokens may be flattened between a linear layer and the norm that went into it.
        errors = (found[name].reshape(right.shape) - right).abs() / size_of(right)
        error = max(error, float(errors.nan_to_num(nan=float("inf")).max()))
        if right.ndim > 2 and min(right.shape[2:]) > 2:
            inner = (slice(None),) * 2 + (slice(1, -1),) * (right.ndim - 2)
            interior = max(interior or 0.0, float(errors[inner].max()))
            errors[inner] = 0
            border = max(border or 0.0, float(errors.max()))
    return error, border, interior


def _certified(
    edit: Edit, model: nn.Module, deploy: nn.Module, precise: nn.Module, measured: _Measured
) -> BlockCertificate:
    fold = fold_of(edit)
    error, border, interior = measured.errors.get(fold, (None, None, None))
    return BlockCertificate(
        edit.path,
        edit.before,
        edit.after,
        error,
        border,
        interior,
        _first_inexact(deploy, precise, fold.places),
        digest(_tensors(model, fold.modules)),
        digest(_tensors(deploy, fold.places)),
    )


def _first_inexact(deploy: nn.Module, precise: nn.Module, places: Sequence[str]) -> str:
    right = dict(_tensors(precise, places))
    given = dict(_tensors(deploy, places))
    if given.keys() != right.keys():
        return sorted(given.keys() ^ right.keys())[0]
    wrong = (name for name, value in given.items() if not _is_cast(value, right[name]))
    return next(wrong, "")


def _is_cast(value: Tensor, right: Tensor) -> bool:
    cast = right.to(value.dtype).to(value.device)
    return value.shape == cast.shape and torch.equal(value, cast)


def _tensors(model: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        for name, tensor in model.get_submodule(path).state_dict().items():
            yield f"{path}.{name}" if path else name, tensor


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The first digits of the sha256 of names, dtypes, shapes and bytes."""
    hashed = hashlib.sha256()
    for name, tensor in tensors:
        host = tensor.detach().cpu().contiguous()
        hashed.update(f"{name} {host.dtype} {tuple(host.shape)}".encode())
        hashed.update(host.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:_DIGITS]
