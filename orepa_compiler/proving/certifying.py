"""Certifying a collapse: its blocks and its whole forward, measured beside the model's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.compiler import collapsed_by
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes.collapse.folds import Fold, fold_of
from orepa_compiler.planning import Edit, Plan, recorded_plans
from orepa_compiler.preconditions import check_unrounded
from orepa_compiler.proving.certificate import BlockCertificate, Certificate, ForwardCertificate
from orepa_compiler.validation.agreement import largest_error, stale_modules
from orepa_compiler.validation.behaviour import TrialCall, behaviour
from orepa_compiler.validation.blame import place_of
from orepa_compiler.verification.evaluation import Side, batches_of, evaluate, evaluation_mode
from orepa_compiler.verification.nesting import map_tensors, named_leaves
from orepa_compiler.verification.outputs.comparison import magnitude_of

_DIGITS = 16  # of a sha256, in what is printed and kept


def certify(model: nn.Module, deploy: nn.Module, inputs: Any) -> Certificate:
    """Proves that `deploy` is the collapse of `model`, block by block, and gives the certificate.

        assert orepa.certify(model, deploy, images)

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
    """Compares the whole forwards on one batch, and counts how often each block runs in them."""
    places = [place_of(edit) for edit in edits]
    models = (exact, precise, value_copy(deploy).double())
    right, collapsed, deployed = (
        behaviour(m, [batch], [TrialCall(0, False)], dtype=torch.float64, watched=places)
        for m in models
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
            "deploy is not recorded as a collapse of this model; give a model and what "
            "orepa.collapse(model) returned for it"
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
    """Measures the largest error of all outputs, on the border and inside where there is a map."""
    error, border, interior = 0.0, None, None
    if not expected or expected.keys() != found.keys():
        return float("inf"), None, None
    for name, right in expected.items():
        if right.numel() != found[name].numel():
            return float("inf"), None, None
        # Tokens may be flattened between a linear layer and the norm that went into it.
        errors = (found[name].reshape(right.shape) - right).abs() / magnitude_of(right)
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
    """Gives the first digits of the sha256 of names, dtypes, shapes and bytes."""
    hashed = hashlib.sha256()
    for name, tensor in tensors:
        host = tensor.detach().cpu().contiguous()
        hashed.update(f"{name} {host.dtype} {tuple(host.shape)}".encode())
        hashed.update(host.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:_DIGITS]
