"""Running one side of a comparison: on which batches, in which mode, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orepa_compiler.errors import ReparamError
from orepa_compiler.verification.modes import evaluation_mode as evaluation_mode
from orepa_compiler.verification.nesting import (
    Form,
    describe_argument,
    form_of,
    is_finite,
    kind_name,
    leaf_paths,
    map_tensors,
    named_leaves,
    others_in,
    tensors_in,
)
from orepa_compiler.verification.outputs.decisions import Deciding, Decision

Batch = tuple[Any, ...]  # the positional arguments of one call


@dataclass(frozen=True)
class Side:
    """One function to evaluate.

    role: how messages name it. dtype, device: what floating and all inputs are brought to before
    the call; None leaves them. hint: what a message adds when the call raises.
    """

    role: str
    run: Callable[..., Any]
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    hint: str = ""


@dataclass(frozen=True)
class Outputs:
    """What one call returned: its leaves by name, tensors copied to the CPU.

    origin: the first module whose output is not finite; "" where there is none, or nothing to look
    into. decisions: what masks and indices were decided on, where that was followed. paths: where a
    module's leaves lie in what it returned.
    """

    leaves: dict[str, Any]
    form: Form
    origin: str = ""
    decisions: dict[str, Decision] = field(default_factory=dict)
    paths: tuple[tuple[Any, ...], ...] = ()


def batches_of(inputs: Any) -> list[Batch]:
    """The batches in `inputs`: a tensor, a tuple of positional arguments, or a list of such.

    Raises ReparamError for anything else, for an argument that is neither a tensor nor a plain
    value, and for a tensor on the meta device.
    """
    batches: list[Batch] = []
    for index, batch in enumerate(inputs if isinstance(inputs, list) else [inputs]):
        if not isinstance(batch, (Tensor, tuple)):
            raise ReparamError(
                f"inputs: batch {index} is a {kind_name(batch)}; give a tensor, a tuple of "
                f"positional arguments, or a list of such batches"
            )
        batches.append(batch if isinstance(batch, tuple) else (batch,))
        _check_arguments(index, batches[-1])
    return batches


def run_to(purpose: str, model: nn.Module, batch: Batch, index: int) -> None:
    """Runs the model on a batch for what it does on the way. ReparamError where it raises."""
    try:
        model(*map_tensors(batch, Tensor.clone))  # it may write into what it is given
    except Exception as error:  # a forward is the user's code: anything may come out of it
        raise ReparamError(
            f"the model does not run on batch {index} of the inputs to {purpose} on "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_arguments(index: int, batch: Batch) -> None:
    for leaf in others_in(batch):
        if not isinstance(leaf, str):
            raise ReparamError(
                f"inputs: batch {index} holds a {kind_name(leaf)}; arguments are torch tensors and "
                f"plain values (torch.as_tensor makes a tensor of an array)"
            )
    if any(tensor.is_meta for tensor in tensors_in(batch)):
        raise ReparamError(
            f"no values to compare; batch {index} of the inputs is on the meta device. Give "
            f"tensors that hold values"
        )


def refuse_unusable(role: str, function: Any, batches: list[Batch]) -> None:
    """Nothing, where `function` can be called on these batches as they are.

    Raises ReparamError for what cannot be called, for a module without values (on the meta device,
    or not yet initialised), and for inputs on another device than the module's.
    """
    if not callable(function):
        raise ReparamError(
            f"the {role} is a {kind_name(function)}; give an nn.Module or a function"
        )
    devices: set[torch.device] = set()
    for name, tensor in _state(function) if isinstance(function, nn.Module) else ():
        if tensor.is_meta or is_lazy(tensor):
            where = "is on the meta device" if tensor.is_meta else "has no shape yet"
            raise ReparamError(
                f"no values to compare; {name} of the {role} {where}. Load the weights first"
            )
        devices.add(tensor.device)
    if len(devices) != 1:  # without parameters, or spread over devices: only the call can tell
        return
    (home,) = devices
    for index, batch in enumerate(batches):
        for tensor in tensors_in(batch):
            # A tensor without axes may stay on the CPU; so do the plain numbers.
            if tensor.ndim and tensor.device != home:
                raise ReparamError(
                    f"the {role} is on {home}, but batch {index} of the inputs holds a tensor on "
                    f"{tensor.device}; move one of them"
                )


@torch.no_grad()
def evaluate(side: Side, batches: list[Batch], *, follows: bool = False) -> list[Outputs]:
    """The outputs of `side` on every batch.

    follows: also what its masks and indices are decided on. Raises ReparamError naming the side,
    the batch and the shapes, when the call raises.
    """
    return [_evaluate(side, index, batch, follows) for index, batch in enumerate(batches)]


def _evaluate(side: Side, index: int, batch: Batch, follows: bool) -> Outputs:
    deciding = Deciding() if follows else None
    try:
        with deciding or nullcontext():
            value = side.run(*_placed(side, batch))
        returned = named_leaves(value)
        # Copied at once: a session may write its next outputs into the same memory.
        leaves = {name: _copied(leaf) for name, leaf in returned.items()}
    except Exception as error:
        shapes = ", ".join(describe_argument(argument) for argument in batch)
        raise ReparamError(
            f"the {side.role} raised at batch {index}, inputs {shapes}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}{side.hint}"
        ) from error
    origin = ""
    if isinstance(side.run, nn.Module) and not is_finite(list(leaves.values())):
        origin = first_nonfinite(side.run, _placed(side, batch))
    decisions = deciding.of(returned) if deciding else {}
    paths = leaf_paths(value) if isinstance(side.run, nn.Module) else ()
    return Outputs(leaves, form_of(value), origin, decisions, paths)


def _placed(side: Side, batch: Batch) -> Batch:
    def place(tensor: Tensor) -> Tensor:
        dtype = side.dtype if side.dtype and tensor.is_floating_point() else tensor.dtype
        # A copy always: a model may begin with an activation in place.
        return tensor.detach().to(side.device or tensor.device, dtype, copy=True)

    placed: Batch = map_tensors(batch, place)
    return placed


def _copied(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf


def first_nonfinite(module: nn.Module, arguments: Batch) -> str:
    """The first module, in the order they finish, with finite inputs and an output that is not.

    Where its own parameters or buffers hold NaN or inf, the text names one. "" when nothing is to
    blame.
    """
    if not is_finite(arguments):
        return "the inputs already hold NaN or inf"
    found: list[str] = []
    began_finite: dict[nn.Module, bool] = {}

    def before(child: nn.Module, inputs: Any, keywords: Any) -> None:
        # Looked at before the call: a layer that works in place spoils its own inputs.
        began_finite[child] = not found and is_finite([inputs, keywords])

    def watch(path: str) -> Callable[..., None]:
        def after(child: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
            if not found and began_finite[child] and not is_finite(output):
                because = _bad_state(child) or "its inputs are finite"
                found.append(f"{path or 'the model itself'} ({type(child).__name__}; {because})")

        return after

    handles = []
    for path, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(child.register_forward_hook(watch(path), with_kwargs=True))
    try:
        module(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _bad_state(module: nn.Module) -> str:
    own = _state(module, recurse=False)
    bad = [name for name, tensor in own if not is_finite(tensor)]
    return f"its {bad[0]} holds NaN or inf" if bad else ""


def paired(expected: Outputs, found: Outputs, *, strict: bool = True) -> Outputs:
    """`found` under the names of `expected`, where only the order is a contract.

    That is so when `expected` names nothing and `found` does (an exported file names every output),
    and when the fields of `expected` come back as a plain tuple. strict: of two modules, both name
    what they mean to.
    """
    are_modules = strict and bool(expected.paths and found.paths)
    names_nothing = (
        not are_modules
        and expected.form in ("tensor", "sequence")
        and found.form in ("fields", "mapping")
    )
    drops_fields = expected.form == "fields" and found.form == "sequence"
    if not (names_nothing or drops_fields) or len(expected.leaves) != len(found.leaves):
        return found
    names = dict(zip(found.leaves, expected.leaves, strict=True))
    return replace(
        found,
        leaves={names[name]: leaf for name, leaf in found.leaves.items()},
        decisions={names[name]: decision for name, decision in found.decisions.items()},
    )


def own_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating parameter or buffer; None where there is none."""
    return next((t.dtype for _, t in _state(module) if t.is_floating_point()), None)


def _state(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(recurse=recurse), module.named_buffers(recurse=recurse))
