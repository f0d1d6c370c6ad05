"""A model without values, and what can be seen of it without running it.

The copy is on the meta device: it costs little memory, and nothing done to it reaches the user's
model.
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from orepa_compiler.errors import ReparamError

_WRAPPERS = {
    "DistributedDataParallel": "model.module",
    "DataParallel": "model.module",
    "FullyShardedDataParallel": "the model before wrapping it",
    "OptimizedModule": "the model before torch.compile",
}
_SEES_ALL = {"__torch_function__", "__torch_dispatch__"}
_KIND = "_class_before_copy"
LAZY = (UninitializedParameter, UninitializedBuffer)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection, for what holds no values: small objects in great number.

    Python would go over all that is imported again and again, a quarter of the time of a plan.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def check_wrapper(model: nn.Module) -> None:
    """Nothing, for a model that can be rewritten; ReparamError for a wrapped or scripted one."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ReparamError("the model is TorchScript; pass the nn.Module it was scripted from")
    name = type(model).__name__
    if name in _WRAPPERS:
        raise ReparamError(f"the model is wrapped in {name}; pass {_WRAPPERS[name]}")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ReparamError(
            "the model's parameters are sharded (DTensor); orepa.save it in every process, and "
            "orepa.load the file in one"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of it (a DTensor, which is slow to import)."""
    return type(tensor).__name__ == "DTensor"


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model without values: every tensor is on the meta device, sharing is kept."""
    memo: dict[int, object] = {}
    keep_alive = []
    for module in model.modules():
        memo |= _empty_copies(module)
        tensors = [*module._parameters.values(), *module._buffers.values()]
        tensors += [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in tensors:
            if tensor is None or isinstance(tensor, LAZY):
                continue
            empty = _empty(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            empty = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            if kind := own_kind(tensor):
                setattr(empty, _KIND, kind)
            memo[id(tensor)] = empty
            keep_alive.append(tensor)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ReparamError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "remove what copy.deepcopy cannot copy"
        ) from error


def own_kind(tensor: Tensor) -> str | None:
    """The name of a user's class of tensors that sees every function called on it, or None.

    A copy without values is of torch's class, and remembers that name.
    """
    if known := getattr(tensor, _KIND, None):
        return str(known)
    users = (c for c in type(tensor).__mro__ if c.__module__.split(".")[0] != "torch")
    return type(tensor).__name__ if any(_SEES_ALL & vars(c).keys() for c in users) else None


def _empty(tensor: Tensor) -> Tensor:
    """The tensor without its values. Strided ones are made in C++: empty_like is Python there."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return torch.empty_like(tensor, device="meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def value_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with its values.

    A tensor that a forward left on a module, with the graph that made it (the kernel of weight_norm
    after a call), is copied without that graph: copy.deepcopy alone refuses it. Parameters of a
    TorchScript part are parameters in the copy too: copy.deepcopy alone hangs them on a graph.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        memo |= _empty_copies(module)
        for tensor in (*vars(module).values(), *module._buffers.values()):
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    copied = copy.deepcopy(model, memo)
    for parameter in copied.parameters():
        if not parameter.is_leaf:
            parameter.detach_().requires_grad_()
    return copied


def _empty_copies(module: nn.Module) -> dict[int, object]:
    """Copies of the containers without anything in them, by id: half of a copy's time is theirs.

    A module has a dozen, one for each kind of hook.
    """
    values = vars(module).values()
    return {id(v): type(v)() for v in values if type(v) in (dict, OrderedDict, set, list) and not v}


def check_copied(model: nn.Module, copied: nn.Module) -> None:
    """Nothing, for a copy of the model that runs its own layers; ReparamError for another.

    copy.deepcopy copies no function: one that was set on a module, and that uses a module around
    it, runs the layers of this model in a copy too. Where a class says how it is copied, and makes
    the function anew (the metrics of torchmetrics), the copy has one of its own.
    """
    own = {id(module) for module in model.modules()}
    for path, module in copied.named_modules():
        for name, value in vars(module).items():
            if _holds_on(value, own):
                raise ReparamError(
                    f"its attribute {name!r} is a function that holds on to this very model, so a "
                    "copy of the model would run the layers of the original; pass inplace=True, or "
                    "make the function a method of the class",
                    path=path,
                )


def _holds_on(value: Any, own: set[int], *, depth: int = 4) -> bool:
    """Whether a function uses one of these modules, or a method of one, as a variable around it."""
    function = value.func if isinstance(value, partial) else getattr(value, "__func__", value)
    if not isinstance(function, FunctionType) or not depth:
        return False
    try:
        around = inspect.getclosurevars(function)
    except ValueError:  # a variable that was never given a value
        return False
    names = (*around.nonlocals.values(), *around.globals.values(), *(function.__defaults__ or ()))
    holders = (held.__self__ if isinstance(held, MethodType) else held for held in names)
    return any(id(h) in own or _holds_on(h, own, depth=depth - 1) for h in holders)


def aliases_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path -> all the paths under which the same module is registered."""
    paths: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[id(module)].append(path)
    return {path: tuple(group) for group in paths.values() for path in group}


def tied_modules(model: nn.Module) -> dict[str, str]:
    """Modules that share a parameter with another module: path -> the other's path."""
    holders: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)].append(path)
    tied: dict[str, str] = {}
    for paths in holders.values():
        others = list(dict.fromkeys(paths))
        if len(others) > 1:
            tied |= {path: next(o for o in others if o != path) for path in others}
    return tied
