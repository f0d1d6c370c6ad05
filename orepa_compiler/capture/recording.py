"""Recording: the graph of a forward that cannot be traced, from a real call on the user's inputs.

A trace follows symbols and stops where control flow asks for a value. A recording watches one real
call instead: which child ran on which tensor, and what else read it. It holds for the inputs that
it saw, so it is taken on every batch that is given and kept only if all of them agree.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.jit import ScriptModule
from torch.utils.hooks import RemovableHandle

from orepa_compiler.capture.arguments import Arguments, arguments_of, bound_forward
from orepa_compiler.capture.effects.nested import PLAIN, parts, tensors
from orepa_compiler.capture.schemas import writes
from orepa_compiler.capture.watching import tells_form, watching_functions

# Reads of a tensor's form that sizes do not decide.
_OF_ONE_CALL = {"requires_grad", "grad_fn", "is_leaf", "is_inference"}


@dataclass(frozen=True)
class Recording:
    """What was seen: owner path -> the graph of its forward, or why there is none.

    doubtful: owners that looked at the values of a tensor, and what they asked: another input could
    take another way through them. reads: module path -> owners whose forward uses its parameters,
    or calls it from outside. arguments: the ways in which the model itself was called.
    """

    graphs: Mapping[str, fx.Graph] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    doubtful: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    arguments: tuple[Arguments, ...] = ()


@torch.no_grad()
def record(model: nn.Module, owners: Iterable[str], run: Callable[[], object]) -> Recording:
    """The forwards of the modules at these paths, seen while `run` calls the model."""
    recorder = _Recorder(model, set(owners))
    with recorder.watching():
        run()
    return recorder.recording()


@dataclass
class _Frame:
    """One running call of an owner's forward, and the graph that grows with it.

    nodes: id of a tensor -> its node; alive: the same tensors, weakly, for what escapes the call.
    """

    owner: str
    graph: fx.Graph
    nodes: dict[int, fx.Node] = field(default_factory=dict)
    alive: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    asked_values: str = ""

    def give(self, tensor: Tensor, node: fx.Node) -> None:
        """From now on this tensor is the value of the node."""
        key = id(tensor)
        self.nodes[key] = node
        self.alive[key] = weakref.ref(tensor, lambda _: self._forget(key))

    def give_all(self, value: Any, node: fx.Node) -> None:
        """The tensors in a value that may be nested; parts of a tuple get nodes of their own."""
        if isinstance(value, Tensor):
            self.give(value, node)
            return
        for key, part in parts(value):
            if any(True for _ in tensors(part)):
                self.give_all(part, self.graph.call_function(operator.getitem, (node, key)))

    def escaped(self, returned: set[int]) -> list[fx.Node]:
        """The values that outlive the call without being returned in plain sight."""
        alive = (key for key, tensor in self.alive.items() if tensor() is not None)
        kept = [self.nodes[key] for key in alive if key not in returned]
        return [node for node in dict.fromkeys(kept) if node.op != "placeholder"]

    def _forget(self, key: int) -> None:
        self.nodes.pop(key, None)
        self.alive.pop(key, None)


class _Recorder:
    """Watches a model through hooks on its modules and a mode on torch's functions."""

    def __init__(self, model: nn.Module, owners: set[str]) -> None:
        self.model, self.owners = model, owners
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.parameters = {id(p): name for name, p in _named_tensors(model)}
        self.stack: list[_Frame | None] = []
        self.graphs: dict[str, fx.Graph] = {}
        self.refused: dict[str, str] = {}
        self.doubtful: dict[str, str] = {}
        self.reads: dict[str, dict[str, None]] = {}

    def recording(self) -> Recording:
        graphs = {path: graph for path, graph in self.graphs.items() if path not in self.refused}
        missed = dict.fromkeys(self.owners - self.graphs.keys(), "it did not run on the inputs")
        reads = {path: tuple(owners) for path, owners in self.reads.items()}
        return Recording(graphs, {**missed, **self.refused}, self.doubtful, reads)

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        for module in self.model.modules():
            if isinstance(module, ScriptModule):  # it takes no hooks: its operators are seen
                continue
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            leave = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
            handles.append(leave)
        try:
            with watching_functions(self.called):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def frame(self) -> _Frame | None:
        return self.stack[-1] if self.stack else None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path = self.paths[id(module)]
        if path not in self.owners:
            self.stack.append(None)
            return
        frame = _Frame(path, fx.Graph())
        named = [(f"arg_{number}", value) for number, value in enumerate(args)]
        for name, value in [*named, *kwargs.items()]:
            frame.give_all(value, frame.graph.placeholder(name))
        self.stack.append(frame)

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        frame = self.stack.pop()
        if frame is not None:
            self._finish(frame, output)
        caller = self.frame
        if caller is not None:
            target = _relative(self.paths[id(module)], caller.owner)
            if target is None:
                self.reads.setdefault(self.paths[id(module)], {})[caller.owner] = None
                return
            node = caller.graph.create_node(
                "call_module",
                target,
                self._arguments(caller, args),
                self._arguments(caller, kwargs),
            )
            node.meta["arguments"] = arguments_of(bound_forward(module), args, kwargs)
            caller.give_all(output, node)

    def called(self, name: str, function: Any, args: Any, kwargs: Any, output: Any) -> None:
        """A torch function ran in the forward of the module on top of the stack."""
        frame = self.frame
        if frame is None:
            return
        if name in _OF_ONE_CALL:  # another call may answer it in another way
            frame.asked_values = frame.asked_values or name
        if tells_form(name):
            return
        touched = [*tensors(args), *tensors(list(kwargs.values()))]
        if not any(id(t) in frame.nodes or id(t) in self.parameters for t in touched):
            return  # made from constants alone
        is_write = writes(name)
        if not is_write and not any(True for _ in tensors(output)):
            frame.asked_values = name
        node = frame.graph.call_function(
            function, self._arguments(frame, args), self._arguments(frame, kwargs)
        )
        frame.give_all(output, node)
        if is_write:
            frame.give(touched[0], node)  # x[...] = y gives nothing back and changes x

    def _arguments(self, frame: _Frame, value: Any) -> Any:
        """The value with nodes in place of tensors, as a graph can hold it."""
        if isinstance(value, Tensor):
            return frame.nodes.get(id(value)) or self._parameter(frame, value)
        if isinstance(value, PLAIN) and not isinstance(value, tuple):
            return value
        held = [(key, self._arguments(frame, part)) for key, part in parts(value)]
        if isinstance(value, dict):
            return {str(key): part for key, part in held}
        inside = [part for _, part in held]
        if isinstance(value, (list, tuple)):
            return inside if isinstance(value, list) else tuple(inside)
        return inside or repr(type(value))

    def _parameter(self, frame: _Frame, tensor: Tensor) -> fx.Node | None:
        name = self.parameters.get(id(tensor))
        if name is None:
            return None
        self.reads.setdefault(name.rpartition(".")[0], {})[frame.owner] = None
        target = _relative(name, frame.owner) or name
        node = frame.graph.create_node("get_attr", target)
        frame.nodes[id(tensor)] = node
        return node

    def _finish(self, frame: _Frame, output: Any) -> None:
        returned = {id(tensor) for tensor in tensors(output)}
        escaped = frame.escaped(returned)
        result = self._arguments(frame, output)
        frame.graph.output((result, escaped) if escaped else result)
        path = frame.owner
        if frame.asked_values:
            self.doubtful[path] = frame.asked_values
        if _dataflow(self.graphs.setdefault(path, frame.graph)) != _dataflow(frame.graph):
            self.refused[path] = "it ran in two different ways on the inputs"


def _dataflow(graph: fx.Graph) -> list[tuple[object, ...]]:
    """What runs on what, without the numbers, which follow the size of the input."""
    return [(node.op, str(node.target), *map(str, node.all_input_nodes)) for node in graph.nodes]


def _relative(path: str, owner: str) -> str | None:
    """The path as the owner sees it, or None for what is not inside it."""
    if not owner:
        return path
    return path[len(owner) + 1 :] if path.startswith(owner + ".") else None


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
