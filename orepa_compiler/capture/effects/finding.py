"""Finds what a forward does beside computing, which a graph of it does not hold.

It switches gradients or autocast for a part, sets attributes, counts, draws random numbers, writes
over its buffers: a trace does this once and does not write it down. A forward that is written anew
would do none of this; and where what it changes is read again, the next call may go another way, so
that the graph shows one way of several.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from orepa_compiler.capture.effects.noticing import (
    TensorsUsed,
    ambient,
    autocast_entered,
)
from orepa_compiler.capture.effects.randomness import RandomState
from orepa_compiler.capture.effects.state import (
    MADE_BY_TRACE,
    OWN,
    Visible,
    held_proxies,
    visible_to,
)
from orepa_compiler.capture.tracing.bytecode import functions_of, names_read

_KEY = "effects"
_NOTHING = object()
_WATCHING: list[Effects] = []  # a call of a child is traced within the trace of its caller


@dataclass(frozen=True)
class Seen:
    """What was seen of one forward.

    does: what it does beside computing, in words. steers: why another call may go another way.
    written: its buffers that it writes over. reads: the paths of modules whose tensors it uses, and
    the graph does not show it. sets: (path, attribute) of what it sets on modules. touched: the
    objects that it changes, by identity. asked: the names that it looks for in its **kwargs, each
    with what it takes where they are not given. types: the arguments whose type it asks for, with
    the classes that they are not.
    """

    does: str = ""
    steers: str = ""
    written: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    sets: frozenset[tuple[str, str]] = frozenset()
    touched: frozenset[Hashable] = frozenset()
    asked: tuple[tuple[str, Any], ...] = ()
    types: tuple[tuple[str, tuple[type, ...]], ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it says the same of a module that is alike."""
        return not (self.reads or self.sets or self.touched)


@dataclass
class Surroundings:
    """The model around the forwards that are traced: its modules and tensors, by identity.

    attributes_set: the names that some forward sets on a tensor. broken: what was seen of forwards
    that have no graph, by the path of their module. flips: traces as where gradients are off, in
    inference mode and under autocast.
    """

    modules: dict[int, str] = field(default_factory=dict)
    tensors: dict[int, str] = field(default_factory=dict)
    attributes_set: set[str] = field(default_factory=set)
    broken: dict[str, Seen] = field(default_factory=dict)
    flips: bool = False

    def found_before_error(self, module: nn.Module, seen: Seen) -> None:
        path = self.modules.get(id(module))
        if path is not None and seen != Seen():
            self.broken[path] = seen


def surroundings_of(model: nn.Module) -> Surroundings:
    """The modules and tensors of a model by identity, each by its first path."""
    modules = {id(module): path for path, module in model.named_modules()}
    named = (*model.named_parameters(), *model.named_buffers())
    return Surroundings(modules, {id(tensor): name for name, tensor in named})


class Effects:
    """Watches a forward while it is traced.

    found: what it does, in words. kept: the stand-ins that it leaves somewhere.
    """

    def __init__(self, module: nn.Module, around: Surroundings, forward: str = "forward") -> None:
        self.module, self.around = module, around
        self.functions = functions_of(module, forward)
        self.found: dict[str, None] = {}
        self.steers: dict[str, None] = {}
        self.reads: set[str] = set()
        self.written: set[str] = set()
        self.sets: list[tuple[nn.Module, str, Any]] = []
        self.touched: set[Hashable] = set()
        self.registered: list[tuple[nn.Module, str, Any]] = []
        self.kept: list[fx.Proxy] = []
        self.buffers = {id(buffer) for buffer in module.buffers()}
        self.written_outside: set[str] = set()
        self.asked: dict[str, Any] = {}
        self.types: dict[str, dict[type, None]] = {}
        self.tensors = TensorsUsed(self.read)

    def look(self) -> None:
        """To be called whenever something is computed."""
        if not torch.is_grad_enabled() and not self.around.flips:
            self.found["switches gradients off"] = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """With gradients on; sees what the forward switches, sets, draws and writes over."""
        _WATCHING.append(self)
        before, versions = visible_to(self.module, self.functions), _versions(self.module)
        drawn, held = RandomState(), _registered(self.module)
        try:
            with (
                ambient(self.around.flips),
                autocast_entered(lambda: self.found.setdefault("switches autocast")),
                self.tensors,
            ):
                yield
        finally:
            _WATCHING.remove(self)
            self.written |= _changed(versions, _versions(self.module))
            self.found |= dict.fromkeys(f"changes its {name}" for name in sorted(self.written))
            self._compare(before, visible_to(self.module, self.functions))
            self._give_back()
            for mapping, was in held:
                if not _is_same(mapping, was):
                    self._steered("changes what is registered in it")
                    mapping.clear()
                    mapping.update(was)
            if drawn.has_moved():
                self._steered("draws random numbers")
                drawn.put_back()

    def _steered(self, what: str) -> None:
        self.found[what] = None
        self.steers[what] = None

    def _compare(self, before: Visible, after: Visible) -> None:
        read = self.names_read
        for name, fact in after.facts.items():
            if fact == before.facts.get(name):
                continue
            value, own = after.values[name], name.removeprefix("its ")
            self.kept += held_proxies(value)
            self.found[f"changes {name}"] = None
            if own == name or own in read:  # what nobody reads steers nothing
                self.steers[f"changes {name}"] = None
            self.touched |= after.homes[name]

    @property
    def names_read(self) -> frozenset[str]:
        return frozenset().union(*(names_read(f.__code__) for f in self.functions))

    def _give_back(self) -> None:
        """Attributes that hold a stand-in, and registered places, get what they held before."""
        for module, name, registered in reversed(self.registered):
            setattr(module, name, registered)
        for module, name, old in reversed(self.sets):
            if any(True for _ in held_proxies(vars(module).get(name))):
                vars(module).pop(name)
                if old is not _NOTHING:
                    vars(module)[name] = old

    def set_on(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute of a module is about to be set."""
        old = vars(module).get(name, _NOTHING)
        if self is not _WATCHING[-1] or name.startswith(MADE_BY_TRACE):
            return
        is_same = old is value or (type(old) is type(value) and _equal(old, value))
        if is_same and (name != "training" or module is self.module):  # in the other mode it is not
            return
        registered = next((d[name] for d in map(vars(module).get, OWN) if d and name in d), None)
        if registered is not None or isinstance(value, (nn.Module, nn.Parameter)):
            if registered is value:
                return
            self.registered.append((module, name, registered))
            self._steered(f"sets its {name}")
        self.sets.append((module, name, old))
        self.kept += held_proxies(value)
        if module is not self.module:
            path = self.around.modules.get(id(module), type(module).__name__)
            self._steered(f"sets {name} of {path}")

    def read(self, tensor: Tensor, writes: bool) -> None:
        """A tensor, no stand-in, is used."""
        if self is not _WATCHING[-1]:
            return
        name = self.around.tensors.get(id(tensor))
        if name is not None:
            self.reads.add(name.rpartition(".")[0])
        if not writes or id(tensor) in self.buffers:
            return
        if name is None:
            self._steered("writes over a tensor that it keeps")
        else:
            self.found[f"writes over {name}"] = None
            self.written_outside.add(name)

    def seen(self) -> Seen:
        paths = self.around.modules
        sets = {(paths.get(id(module), ""), name) for module, name, _ in self.sets
                if module is not self.module}  # fmt: skip
        sets |= {name.rpartition(".")[::2] for name in self.written_outside}
        own = {("", name) for module, name, _ in self.sets if module is self.module}
        return Seen(
            " and ".join(self.found),
            " and ".join(self.steers),
            frozenset(self.written),
            frozenset(self.reads - {paths.get(id(self.module))}),
            frozenset(sets | own),
            frozenset(self.touched),
            tuple(self.asked.items()),
            tuple((name, tuple(classes)) for name, classes in self.types.items()),
        )

    def note(self, graph: fx.Graph) -> None:
        """Writes what was found into the graph."""
        if (seen := self.seen()) != Seen():
            output(graph).meta[_KEY] = seen


def _registered(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The modules, parameters and buffers of a module and of its children, as they are now."""
    mappings = [getattr(held, own) for held in (module, *module.children()) for own in OWN]
    return [(mapping, dict(mapping)) for mapping in mappings]


def _is_same(mapping: dict[str, Any], before: dict[str, Any]) -> bool:
    return list(mapping) == list(before) and all(mapping[k] is v for k, v in before.items())


def _versions(module: nn.Module) -> dict[str, Any]:
    """How often each buffer was written over; one made in inference mode does not tell."""
    return {
        name: (id(buffer), 0 if buffer.is_inference() else buffer._version)
        for name, buffer in module.named_buffers()
    }


def _changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in after if after[name] != before.get(name)}


def _equal(one: Any, two: Any) -> bool:
    plain = (bool, int, float, str, bytes, tuple, type(None))
    return isinstance(one, plain) and bool(one == two)


def keep_(value: Tensor) -> Tensor:
    """A value that a forward leaves somewhere else than in what it returns."""
    return value


def seen_of(graph: fx.Graph | None) -> Seen:
    """What was seen of the forward of a graph while it was traced."""
    return Seen() if graph is None else output(graph).meta.get(_KEY, Seen())


def written_buffers(graph: fx.Graph | None) -> frozenset[str]:
    """The buffers that a forward wrote over while it was traced."""
    return seen_of(graph).written


def effects_of(graph: fx.Graph | None) -> str | None:
    """What the forward of a graph does beside computing, or None."""
    return seen_of(graph).does or None


def output(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))
