"""What a forward is called with: a trace is of one way to call it.

An argument that is the same constant at each call is that constant in the trace, so that
`if mask is None` goes the way that it goes when the model runs; the others are values, of a type.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from orepa_compiler.capture.effects.nested import parts
from orepa_compiler.capture.tracing.kinds import inferred_type

# How those that collect the rest of a call are named, and what they hold when there is none.
_STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}
_NOTHING: dict[Any, Any] = {
    inspect.Parameter.VAR_POSITIONAL: (),
    inspect.Parameter.VAR_KEYWORD: {},
}


# Asked for by who takes all further arguments at once.
WHOLE = "*"


@dataclass(frozen=True)
class Arguments:
    """constants: parameter -> its value. kinds: parameter -> the type of its value, None: unknown.

    Those that collect the rest of a call are named with their stars.
    """

    constants: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, type | None] = field(default_factory=dict)


def arguments_of(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Arguments | None:
    """The arguments of a call, with proxies or tensors for values; None: it takes no such.

    forward: the bound method.
    """
    try:
        signature = inspect.signature(forward)
        given = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return None
    return _sorted(signature, given)


def calls_with(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> tuple[Arguments, ...]:
    """The ways in which batches of positional arguments call a model."""
    found = [arguments_of(bound_forward(model), batch, {}) for batch in batches]
    return tuple(arguments for arguments in found if arguments is not None)


def usual_arguments(forward: Callable[..., Any]) -> Arguments | None:
    """Those of a call with tensors for what must be given, and with nothing else."""
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return None
    needed = {
        name: Tensor
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in _NOTHING
    }
    return _sorted(signature, needed)


def _sorted(signature: inspect.Signature, given: Mapping[str, Any]) -> Arguments:
    constants: dict[str, Any] = {}
    kinds: dict[str, type | None] = {}
    for name, parameter in signature.parameters.items():
        target = _STARS.get(parameter.kind, "") + name
        value = given.get(name, _NOTHING.get(parameter.kind, parameter.default))
        if value is Tensor or isinstance(value, Tensor):
            kinds[target] = Tensor
        elif isinstance(value, (fx.Proxy, fx.Node)):  # of a type that its graph may know
            kinds[target] = inferred_type(value.node if isinstance(value, fx.Proxy) else value)
        elif _holds_value(value):
            kinds[target] = type(value)
        else:
            constants[target] = value
    return Arguments(constants, kinds)


def _holds_value(value: Any, depth: int = 4) -> bool:
    """Whether a container or an object holds what only a run gives."""
    if isinstance(value, (fx.Proxy, fx.Node, Tensor)):
        return True
    return depth > 0 and any(_holds_value(part, depth - 1) for _, part in parts(value))


def bound_forward(module: nn.Module) -> Callable[..., Any]:
    forward: Callable[..., Any] = module.forward
    return forward


class AskedFor(dict[str, Any]):
    """What a model is given beside its named arguments; remembers which names are asked for.

    asked: name -> the value that is taken where it is not given; WHOLE, where it is handed on, or
    gone through, as a whole.
    """

    def __init__(self, given: dict[str, Any], asked: dict[str, Any]) -> None:
        super().__init__(given)
        self.asked = asked

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.setdefault(name, default)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self.asked.setdefault(name, default[0] if default else None)
        return super().pop(name, *default)

    def setdefault(self, name: str, default: Any = None) -> Any:
        self.asked.setdefault(name, default)
        return super().setdefault(name, default)

    def __contains__(self, name: object) -> bool:
        self.asked.setdefault(str(name), False)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.asked.setdefault(name, None)
        return super().__getitem__(name)


def _as_a_whole(name: str) -> Callable[..., Any]:
    """The method of dict, which tells that all there is was asked for."""
    of_dict = getattr(dict, name)

    def method(self: AskedFor, *args: Any) -> Any:
        self.asked.setdefault(WHOLE, None)
        return of_dict(self, *args)

    return method


# `f(**options)` and `{**options}` call keys().
for _name in ("__len__", "__iter__", "__reversed__", "__eq__", "__ne__", "__or__", "__ror__",
              "__repr__", "keys", "values", "items", "copy", "popitem"):  # fmt: skip
    setattr(AskedFor, _name, _as_a_whole(_name))
