"""Notices when gradients that gather over passes were cleared or changed meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.errors import ReparamError

State = tuple[Any, int] | None


class GradientWatch:
    """Notes the gradients of parameters from the first one that a kernel gathers on.

    What is added by a backward pass is no change; all else is one: zero_grad, clipping, unscaling.
    Kernels gather where none of these look, so the two would no longer belong together.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], kernels: Iterable[Tensor]
    ) -> None:
        self._named = dict(named)
        self._names = {id(parameter): name for name, parameter in self._named.items()}
        self._states: dict[str, State] | None = None
        self._changed: list[str] = []
        self._hooks = ExitStack()
        for tensor in (*self._named.values(), *kernels):
            if tensor.requires_grad:
                handle = tensor.register_post_accumulate_grad_hook(self._note)
                self._hooks.callback(handle.remove)

    def _note(self, tensor: Tensor) -> None:
        name = self._names.get(id(tensor))
        if name is None and self._states is None:
            self._states = {own: _state(p) for own, p in self._named.items()}
        elif name is not None and self._states is not None:
            if not _was_added_to(self._states[name], tensor):
                self._changed.append(name)
            self._states[name] = _state(tensor)

    def check(self) -> None:
        """Raise ReparamError where a gradient is not what backward passes left."""
        states = (self._states or {}).items()
        later = [name for name, state in states if not _is_same(state, self._named[name])]
        for name in self._named:
            if name in {*self._changed, *later}:
                raise ReparamError(
                    "its gradient was cleared or changed inside kernels_once, after a backward "
                    "pass, and those that the kernels gathered were not; call zero_grad before "
                    "the first backward pass, clip and unscale after the with block",
                    path=name,
                )

    def close(self) -> None:
        """Takes the hooks away."""
        self._hooks.close()


def _state(tensor: Tensor) -> State:
    grad = tensor.grad
    return None if grad is None else (weakref.ref(grad), grad._version)


def _is_same(state: State, tensor: Tensor) -> bool:
    grad = tensor.grad
    if state is None or grad is None:
        return state is None and grad is None
    return state[0]() is grad and state[1] == grad._version


def _was_added_to(state: State, tensor: Tensor) -> bool:
    """Whether a backward pass, and nothing else, has made the present gradient of that."""
    grad = tensor.grad
    if state is None or grad is None or torch.is_grad_enabled():  # then it made another tensor
        return grad is not None
    return state[0]() is grad and grad._version == state[1] + 1
