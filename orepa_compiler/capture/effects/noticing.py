"""Notices what runs while a forward is traced: tensors used, gradients and autocast switched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.amp.autocast_mode import autocast
from torch.overrides import TorchFunctionMode

from orepa_compiler.capture.effects.nested import tensors
from orepa_compiler.capture.effects.state import held_proxies
from orepa_compiler.capture.schemas import OF_FORM, draws, writes
from orepa_compiler.containers import mapped

# Beside what writes: a property set, and what hands out the memory of a tensor to be written.
_SETTING = {"__set__", "data"}
# What makes a tensor of plain numbers, the same at each call.
_OF_NUMBERS = {"tensor", "arange", "linspace", "full", "zeros", "ones", "eye"}


class TensorsUsed(TorchFunctionMode):
    """Tells of the use of tensors that are no stand-ins: weights reached in other ways.

    used: is given the tensor, and whether it is written over. made: what was made meanwhile.
    of_numbers: those of them that plain numbers alone went into. stand_ins: tensor -> what stands
    for it from now on, since a value that is not known was written into it.
    """

    def __init__(self, used: Callable[[Tensor, bool], None]) -> None:
        super().__init__()
        self.used = used
        self.made: dict[int, Tensor] = {}  # kept alive, so that no other gets its identity
        self.of_numbers: set[int] = set()
        self.stand_ins: dict[int, fx.Proxy] = {}

    def is_of_numbers(self, tensor: Tensor) -> bool:
        """Whether a tensor was made of plain numbers, and holds these alone."""
        return id(tensor) in self.of_numbers

    def is_alone(self, tensor: Tensor) -> bool:
        """Whether no other tensor that was made meanwhile shares the memory of this one."""
        memory = tensor.untyped_storage()._cdata
        others = (other for key, other in self.made.items() if key != id(tensor))
        return all(other.untyped_storage()._cdata != memory for other in others)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property such as Tensor.shape
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if name not in OF_FORM:
            self._look(name, args, kwargs)
            if self.stand_ins and any(id(t) in self.stand_ins for t in tensors((args, kwargs))):
                return self._standing_in(func, name, args, kwargs)
        made = func(*args, **kwargs)
        self._remember(name, made, args, kwargs)
        return made

    def _standing_in(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The call, written into the graph, of what stands for tensors that hold unknown values."""

        def told(value: Any) -> Any:
            return self.stand_ins.get(id(value), value)

        args, kwargs = mapped((args, kwargs), told)
        if name == "__setitem__" and isinstance(args[0], fx.Proxy):
            args[0].__setitem__(*args[1:])
            return None
        proxy = next(p for p in self.stand_ins.values())
        return type(proxy).__torch_function__(func, (), args, kwargs)

    def _remember(self, name: str, made: Any, args: Any, kwargs: Any) -> None:
        """What was made, and whether of plain numbers alone."""
        given = list(tensors((args, kwargs)))
        is_unknown = "empty" in name or draws(name)
        is_plain = (bool(given) or name in _OF_NUMBERS) and not is_unknown
        is_plain = is_plain and all(id(t) in self.of_numbers for t in given)
        for tensor in tensors(made):
            self.made[id(tensor)] = tensor
            if is_plain:
                self.of_numbers.add(id(tensor))
            else:
                self.of_numbers.discard(id(tensor))

    def _look(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(True for _ in held_proxies((args, kwargs))):
            return  # it is a node of the graph
        is_write = writes(name) or name in _SETTING
        for index, value in enumerate((*args, *kwargs.values())):
            for tensor in tensors(value):
                is_target = tensor is kwargs.get("out") or (is_write and index == 0)
                self.used(tensor, is_target and id(tensor) not in self.made)


@contextmanager
def ambient(flips: bool) -> Iterator[None]:
    """As a step of training runs, or as the very opposite of it."""
    if not flips:
        with torch.enable_grad():
            yield
        return
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        for device in before:
            torch.set_autocast_enabled(device, True)
        with torch.inference_mode():
            yield
    finally:
        for device, was in before.items():
            torch.set_autocast_enabled(device, was)


@contextmanager
def autocast_entered(tell: Callable[[], None]) -> Iterator[None]:
    """Tells when autocast is switched for a part."""
    enter = autocast.__enter__

    def entered(context: autocast) -> Any:
        tell()
        return enter(context)

    autocast.__enter__ = entered  # type: ignore[method-assign]
    try:
        yield
    finally:
        autocast.__enter__ = enter  # type: ignore[method-assign]
