"""nn.Module while forwards are traced: it tells who traces of calls, weights and attributes set.

fx sets __call__ and __getattr__ of nn.Module anew for each trace, and Python then goes over every
subclass there is: a millisecond each where timm is imported, a third of the time of a plan. Here
they are set once for many traces, and ask who traces now.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

from torch import fx, nn

_PATCHED_BY_FX = "__fx_already_patched"  # fx leaves a method with this mark as it is


class Tracer(Protocol):
    """What is told: fx's own two methods, and of the attributes that a forward sets."""

    weights_asked_for: dict[str, fx.Proxy]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any: ...
    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any: ...
    def sets(self, module: nn.Module, name: str, value: Any) -> None: ...


class _Tracing(threading.local):  # what runs in another thread is not traced
    def __init__(self) -> None:
        self.tracers: list[Tracer] = []


_now = _Tracing()
_lock = threading.Lock()
_patches: list[Any] = []  # the one that is made, once for each who asked for it


@contextmanager
def traced_by(tracer: Tracer) -> Iterator[None]:
    """Tells this tracer, and not the one whose trace asked for this one, until the end."""
    with modules_patched():
        _now.tracers.append(tracer)
        try:
            yield
        finally:
            _now.tracers.pop()


@contextmanager
def modules_patched() -> Iterator[None]:
    """nn.Module with methods that tell; for all traces inside."""
    with _lock:
        patch = _patches[0] if _patches else _patch()
        if not _patches:
            patch.start()
        _patches.append(patch)
    try:
        yield
    finally:
        with _lock:
            _patches.pop()
            if not _patches:
                patch.stop()


def _patch() -> Any:
    cls = nn.Module
    call, ask, put = cls.__call__, cls.__getattr__, cls.__setattr__

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _now.tracers:
            return call(module, *args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return call(module, *args, **kwargs)

        return _now.tracers[-1].call_module(module, forward, args, kwargs)

    def asked(module: nn.Module, name: str) -> Any:
        value = ask(module, name)
        if not _now.tracers:
            return value
        tracer = _now.tracers[-1]
        return tracer.getattr(name, value, tracer.weights_asked_for)

    def setting(module: nn.Module, name: str, value: Any) -> None:
        if _now.tracers:
            _now.tracers[-1].sets(module, name, value)
        put(module, name, value)

    for method in (called, asked):
        setattr(method, _PATCHED_BY_FX, True)
    return mock.patch.multiple(cls, __call__=called, __getattr__=asked, __setattr__=setting)
