"""The certificate of a collapse: block by block, that one conv computes what the branches did.

Two statements for each block, and together they leave no room for a wrong weight:

    max |conv_64(x) - branches_64(x)| / max |branches_64(x)|  <=  LIMIT      in float64
    W_deploy == cast(W_64),  b_deploy == cast(b_64)                          bit by bit
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.compiler import collapse
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import Edit, Plan, recorded_plans
from orepa_compiler.schemas import read_json
from orepa_compiler.verification.comparison import size_of
from orepa_compiler.verification.evaluation import Side, batches_of, evaluate, evaluation_mode
from orepa_compiler.verification.nesting import map_tensors, named_leaves

# The most that composing kernels in another order may change in float64: 4,500 eps. The blocks of
# thirty models came to 6e-15 at most.
LIMIT = 1e-12

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
class Certificate:
    """All blocks of a collapse; truthy only when there is at least one and each is certified."""

    blocks: tuple[BlockCertificate, ...]

    def __bool__(self) -> bool:
        return bool(self.blocks) and not any(block.reason for block in self.blocks)

    @property
    def verdict(self) -> str:
        """One line: how many blocks, and the worst of them or the first that fails."""
        if not self.blocks:
            return "NOT CERTIFIED: the collapse changed nothing, so there is no block to certify"
        reasons = [block.reason for block in self.blocks if block.reason]
        if reasons:
            return f"NOT CERTIFIED: {len(reasons)} of {len(self.blocks)} blocks; {reasons[0]}"
        worst = max(self.blocks, key=lambda block: block.error or 0.0)
        return (
            f"certified: {len(self.blocks)} blocks; the worst float64 error is "
            f"{worst.error:.1e} ({worst.path}), and every weight is its float64 value, cast once"
        )

    def __str__(self) -> str:
        return self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes."""
        blocks = [{**asdict(block), "reason": block.reason} for block in self.blocks]
        return {"ok": bool(self), "verdict": self.verdict, "limit": LIMIT, "blocks": blocks}

    def to_json(self) -> str:
        """What an ONNX file keeps under orepa.certificate."""
        return json.dumps([asdict(block) for block in self.blocks], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The certificate that to_json wrote. Raises ReparamError for anything else."""
        return cls(tuple(read_json(text, list[BlockCertificate], what="this is not a certificate")))


def certify(model: nn.Module, deploy: nn.Module, inputs: Any) -> Certificate:
    """The certificate that `deploy` is the collapse of `model`.

    deploy: what collapse(model) returned, in any dtype. inputs: the blocks are compared on what
    reaches them when the model runs on the first batch.

    Raises ReparamError where deploy is not recorded as a collapse of the model, and where the model
    does not run in float64.
    """
    edits = _edits(model, deploy)
    batch = batches_of(inputs)[0]
    plan = Plan(tuple(edits))
    exact = value_copy(model).double().eval()
    if not edits:
        return Certificate(())
    try:
        # Composed once more, and not cast: what the weights were rounded from.
        precise = collapse(exact, plan=plan, inputs=_double(batch))
    except (AttributeError, ReparamError) as error:
        raise ReparamError(f"the recorded collapse does not fit the model: {error}") from error
    measured = _Measured(precise, edits)
    with evaluation_mode(exact), measured.watching(exact):
        evaluate(Side("model in float64", exact), [_double(batch)])
    return Certificate(tuple(_certified(edit, model, deploy, precise, measured) for edit in edits))


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
        self.precise, self.edits = precise, list(edits)
        self.errors: dict[str, tuple[float, float | None, float | None]] = {}
        self.inputs: dict[str, Any] = {}
        self.handles: list[Any] = []

    def watching(self, model: nn.Module) -> _Measured:
        for edit in self.edits:
            first, last = _places(edit)[0], _places(edit)[-1]
            self.handles += [
                model.get_submodule(first).register_forward_pre_hook(self._before(edit)),
                model.get_submodule(last).register_forward_hook(self._after(edit)),
            ]
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *reason: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, edit: Edit) -> Any:
        def keep(module: nn.Module, arguments: Any) -> None:
            # A copy: a layer inside may work in place.
            self.inputs.setdefault(_key(edit), map_tensors(arguments, Tensor.clone))

        return keep

    def _after(self, edit: Edit) -> Any:
        def compare(module: nn.Module, arguments: Any, output: Any) -> None:
            key = _key(edit)
            if key not in self.errors and key in self.inputs:
                found = _run(self.precise, edit, self.inputs.pop(key))
                self.errors[key] = _error(named_leaves(output), named_leaves(found))

        return compare


def _key(edit: Edit) -> str:
    return f"{edit.path} {edit.options.get('nodes')}"


def changed_modules(edit: Edit) -> list[str]:
    """The paths of the modules that an edit of a collapse folds or changes, in the order they run.

    The last may be a norm that stays, and takes the bias of the block before it.
    """
    taker = edit.options.get("bias_to")
    return [*edit.options["modules"], *([taker] if taker else [])]


def _places(edit: Edit) -> list[str]:
    """The modules that together take the region's input and give its output."""
    if edit.options["kind"] == "concatenation":
        return [edit.options["within"]]
    return [edit.options["owner"]] if edit.options["kind"] == "graph" else changed_modules(edit)


def _run(precise: nn.Module, edit: Edit, arguments: Any) -> Any:
    value = arguments
    for path in _places(edit):
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
    places = _places(edit)
    error, border, interior = measured.errors.get(_key(edit), (None, None, None))
    return BlockCertificate(
        edit.path,
        edit.before,
        edit.after,
        error,
        border,
        interior,
        _first_inexact(deploy, precise, places),
        digest(_tensors(model, changed_modules(edit))),
        digest(_tensors(deploy, places)),
    )


def _first_inexact(deploy: nn.Module, precise: nn.Module, places: list[str]) -> str:
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
