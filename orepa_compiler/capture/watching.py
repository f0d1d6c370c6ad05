"""Watching what runs: every torch function, and every operator that TorchScript calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.jit._fuser import optimized_execution
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from orepa_compiler.capture.schemas import OF_FORM

# Is told the name of a function, the function, its arguments and what it gave.
Called = Callable[[str, Any, tuple[Any, ...], dict[str, Any], Any], None]


@contextmanager
def watching_functions(called: Called) -> Iterator[None]:
    """Tells of every torch function that runs meanwhile, after it has run."""
    with _Functions(called), _Compiled(), optimized_execution(False):
        yield


def tells_form(name: str) -> bool:
    """Whether a function reads the form of a tensor, and nothing of its values."""
    return name.strip("_") in OF_FORM or name in OF_FORM


class _Functions(TorchFunctionMode):
    def __init__(self, called: Called) -> None:
        super().__init__()
        self.called = called

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.called(_name(func), func, args, kwargs, output)
        return output


class _Compiled(TorchDispatchMode):
    """Shows the mode on functions what TorchScript runs: operators that no function calls.

    It must not fuse them meanwhile: a fused kernel is no operator.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _name(function: Any) -> str:
    if isinstance(function, torch._ops.OpOverload):  # aten.mul_.Tensor
        return str(function.overloadpacket.__name__)
    name = getattr(function, "__name__", "") or str(resolve_name(function) or function)
    if name in ("__get__", "__set__"):  # a property such as Tensor.shape
        owner = getattr(function, "__self__", None)
        name = getattr(owner, "__name__", name) + ("_" if name == "__set__" else "")
    return "setitem_" if name == "__setitem__" else name
