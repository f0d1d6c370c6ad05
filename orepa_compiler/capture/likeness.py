"""Which modules are alike: equal but for their paths and values, so that one trace tells of all.

Blocks of a deep net mostly are. A forward is traced from its module's attributes, and every one of
them is compared; a module with an attribute that cannot be compared is alike to no other.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, Enum),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
_SAME = (type, FunctionType, BuiltinFunctionType)  # a copy of a model shares them
_CONTAINERS = (list, tuple, set, frozenset, torch.Size)
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_DEEPEST = 5  # what is nested deeper, or in itself, is not compared
_STATE = ("_parameters", "_buffers", "_modules")


class _Unlike(Exception):
    """There is something that cannot be compared."""


class Likeness:
    """Numbers for the modules of a model: alike modules have the same one.

    aliases: path -> all paths of the module. A module with several, or with a tensor that stands
    elsewhere too, is alike to none: a trace names what is shared by the place that it finds first.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], aliases: Mapping[str, tuple[str, ...]]
    ) -> None:
        holders = Counter(id(t) for module in modules.values() for t in _tensors(module))
        self._shared = {
            id(module)
            for path, module in modules.items()
            if len(aliases[path]) > 1 or any(holders[id(t)] > 1 for t in _tensors(module))
        }
        self._numbers: dict[Any, int] = {}
        self._known: dict[int, int | None] = {}

    def number(self, module: nn.Module) -> int | None:
        """The number of a module, or None where it is alike to no other."""
        if id(module) not in self._known:
            self._known[id(module)] = self._number(module)
        return self._known[id(module)]

    def _number(self, module: nn.Module) -> int | None:
        if id(module) in self._shared:
            return None
        try:
            form = self._form(module)
        except _Unlike:
            return None
        return self._numbers.setdefault(form, len(self._numbers))

    def _form(self, module: nn.Module) -> Any:
        children = []
        for name, child in module._modules.items():
            number = None if child is None else self.number(child)
            if number is None and child is not None:
                raise _Unlike
            children.append((name, number))
        tensors = (*module._parameters.items(), *module._buffers.items())
        return (
            type(module),
            tuple(children),
            tuple((name, None if t is None else _tensor(t)) for name, t in tensors),
            tuple(
                (name, _fact(value, module))
                for name, value in vars(module).items()
                if name not in _STATE
            ),
        )


def is_plain(value: Any) -> bool:
    """Whether a value holds nothing of the model that it is from, so that it may go to another."""
    try:
        _fact(value)
    except _Unlike:
        return False
    return True


def _tensors(module: nn.Module) -> list[Tensor]:
    found = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in found if tensor is not None]


def _tensor(tensor: Tensor) -> Any:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise _Unlike
    return type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad


def _fact(value: Any, module: nn.Module | None = None, depth: int = _DEEPEST) -> Any:
    """Something to hash and compare in place of a value, an attribute of the module."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, _SAME):
        return "same", id(value)
    if module is not None and isinstance(value, MethodType) and value.__self__ is module:
        return "own method", id(value.__func__)
    if not depth or isinstance(value, (nn.Module, Tensor)):
        raise _Unlike
    if isinstance(value, partial):
        parts: Iterable[Any] = (value.func, value.args, value.keywords)
    elif type(value) in (dict, OrderedDict):
        parts = value.items()
    elif type(value) in _CONTAINERS:
        parts = value
    elif _is_all_in_vars(value):
        parts = vars(value).items()
    else:
        raise _Unlike
    facts = [_fact(part, module, depth - 1) for part in parts]
    is_ordered = type(value) not in (set, frozenset)
    return type(value), tuple(facts) if is_ordered else frozenset(facts)


def _is_all_in_vars(value: Any) -> bool:
    """Whether an object is of a class written in Python, so that its attributes are all of it."""
    classes = type(value).__mro__[:-1]
    is_python = all(cls.__flags__ & _HEAP_TYPE and "__slots__" not in vars(cls) for cls in classes)
    return is_python and hasattr(value, "__dict__")
