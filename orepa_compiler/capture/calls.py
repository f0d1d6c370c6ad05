"""Who calls whom in a captured model, and what stands in the way of a rewrite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from orepa_compiler.capture.arguments import Arguments
from orepa_compiler.capture.effects.finding import effects_of
from orepa_compiler.capture.skeleton import own_kind
from orepa_compiler.capture.tracing.bytecode import functions_in, goes_inside, names_in
from orepa_compiler.capture.tracing.forward import made_up, trace
from orepa_compiler.errors import ReparamError

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# What a hook names that goes from a module to what is in it.
_REACHING = {
    "parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "modules", "weight",
    "named_modules", "children", "named_children", "apply", "_parameters", "_modules", "bias",
    "get_submodule", "get_parameter", "running_mean", "running_var",
}  # fmt: skip
PARAMETRIZED = (
    "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
)


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """The functions that run around the forward and the backward pass of a module."""
    for hooks in _HOOKS:
        yield from getattr(module, hooks).values()


@dataclass(frozen=True)
class Call:
    """One call of a module: the path of the module whose forward makes it, and the node there."""

    owner: str
    node: fx.Node


@dataclass(frozen=True)
class Capture:
    """The graphs of a model, who calls whom, and what stands in the way of a rewrite.

    skeleton: the model on the meta device. graphs: owner path -> graph of its own forward.
    untraced: owner path -> why its forward has no graph. calls: module path -> its calls.
    aliases: path -> all the paths under which the same module is registered.
    reads: module path -> owners that use its parameters directly. tied: module path -> one that
    shares a parameter with it. recorded: owners whose graph was recorded and not traced.
    doubtful: those of them that another input could lead another way, and what they asked for.
    arguments: owner path -> those that its graph was traced with. kept: module path -> why it may
    be neither swapped nor joined with its neighbours, as a check of an earlier rewrite found.
    """

    skeleton: nn.Module
    graphs: dict[str, fx.Graph]
    untraced: dict[str, str]
    calls: dict[str, list[Call]]
    aliases: dict[str, tuple[str, ...]]
    reads: dict[str, list[str]]
    tied: dict[str, str]
    recorded: frozenset[str] = frozenset()
    doubtful: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Arguments] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    def module(self, path: str) -> nn.Module:
        return self.skeleton.get_submodule(path)

    @cached_property
    def layer_graphs(self) -> dict[str, fx.Graph | None]:
        """The graphs of forwards by path, as far as they were asked for (see Graphs)."""
        return {}

    @cached_property
    def kept_training(self) -> frozenset[str]:
        """The modules that the model's own eval() leaves in train mode."""
        mode = self.skeleton.training
        self.skeleton.eval()
        paths = (path for path, module in self.skeleton.named_modules() if module.training)
        found = frozenset(paths)
        self.skeleton.train(mode)
        return found

    def path_of(self, call: Call) -> str:
        """The module that a call_module node calls, by its first path."""
        return self.aliases[join(call.owner, str(call.node.target))][0]

    def own_graph(self, owner: str, module: nn.Module) -> fx.Graph:
        """The graph of an owner's forward, to be run by the module that stands there in the model.

        Raises ReparamError where there is none, or none that holds without the skeleton's values.
        """
        graph = self.graphs.get(owner)
        if graph is None:
            reason = self.untraced.get(owner, "it has no forward of its own")
            raise ReparamError(f"its forward cannot be traced ({reason})", path=owner)
        if not made_up(graph):
            return graph
        again = trace(module, self.arguments.get(owner))  # its constants are computed once more
        if isinstance(again, str) or str(again) != str(graph):
            raise ReparamError("its forward cannot be traced any more", path=owner)
        return again

    def rewrite_refusal(self, owner: str) -> str | None:
        """Why the forward of a module may not be written anew from its graph, or None."""
        if owner in self.kept:
            return self.kept[owner]
        does = effects_of(self.graphs.get(owner))
        if does is None:
            return None
        return f"the forward of {owner or 'the model'} {does}, and one written anew would not"

    def hook_refusal(self, path: str) -> str | None:
        """Why a module with a hook, on itself or on what it is read with, must stay, or None."""
        module = self.module(path)
        read = [module] if path in self.graphs else list(module.modules())
        if any(True for part in read for _ in hooks_of(part)):
            return "it has a hook, which a rewrite would no longer call; remove the hook first"
        if any(vars(torch.nn.modules.module).get(f"_global{hooks}") for hooks in _HOOKS):
            return "there is a hook on all modules (register_module_forward_hook); remove it first"
        return None

    def _reaching_hook(self, path: str) -> str | None:
        """Why a hook around this module may use it, by the names in its code, or None."""
        for owner in ancestors(path):
            module = self.module(owner)
            names = {*path.removeprefix(f"{owner}." if owner else "").split("."), *_REACHING}
            for hook in hooks_of(module):
                functions = list(functions_in(hook))
                if any(names & names_in(f.__code__) or goes_inside(f) for f in functions):
                    return f"a hook on {owner or 'the model'} may use it, or its weight"
        return None

    def swap_refusal(self, path: str, reader: str | None = None) -> str | None:
        """Why no other layer with the same function may stand at this path, or None.

        reader: a module whose forward may read the weight, since what it reads goes too.
        """
        reason = self.kept.get(path) or self.hook_refusal(path) or self._reaching_hook(path)
        if reason:
            return reason
        if parametrize.is_parametrized(self.module(path)):
            return PARAMETRIZED
        module = self.module(path)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and (kind := own_kind(tensor)):
                return f"its weight is a {kind}, which may compute in a way of its own"
        if path in self.tied:
            return f"its weight is shared with {self.tied[path]}"
        for owner in self.reads.get(path, []):
            if owner != reader:
                return f"the forward of {owner or 'the model'} reads its weight directly"
        return None

    def refusal(self, path: str, reader: str | None = None) -> str | None:
        """Why the module at this path may not be joined with its neighbours, or None."""
        if reason := self.swap_refusal(path, reader):
            return reason
        names = self.aliases[path]
        if len(set(map(self._place, names))) > 1:
            return f"it is registered as {' and as '.join(names)}"
        return self._call_refusal(names[0])

    def _place(self, path: str) -> tuple[str, str]:
        """Where a module hangs: one place for all its names, where what holds it has several."""
        holder, _, name = path.rpartition(".")
        return (self.aliases[holder][0], name) if path else ("", "")

    def _call_refusal(self, path: str) -> str | None:
        calls = self.calls.get(path, [])
        if len(calls) > 1:
            return f"it is called {len(calls)} times, so what follows it is not one thing"
        if reason := self.unknown_calls(path):
            return reason
        for call in calls:
            if steered := self.doubtful.get(call.owner):
                return f"the forward of {call.owner or 'the model'} may go another way: {steered}"
        if path and not calls:  # the root is called by the user
            return "no forward calls it"
        return None

    def unknown_calls(self, path: str) -> str | None:
        """Why there may be calls of this module that no graph shows, or None."""
        names = self.aliases.get(path, (path,))
        for owner in dict.fromkeys(outer for each in names for outer in ancestors(each)):
            if owner in self.untraced:
                name = f"the forward of {owner or 'the model'}"
                return f"{name} cannot be traced ({self.untraced[owner]})"
        return None

    def consumers(self, call: Call) -> Iterator[Call | None]:
        """Who reads the value of a node, also across module borders; None for the model's output.

        A tuple or dict that holds the value counts as its consumer.
        """
        for user in call.node.users:
            if user.op == "output":
                yield from self._returned(call.owner, user.args[0] is call.node, user)
            elif user.op == "call_module" and (inside := self.entry(Call(call.owner, user), call)):
                yield from self.consumers(inside)
            else:
                yield Call(call.owner, user)

    def _returned(self, owner: str, is_whole: bool, output: fx.Node) -> Iterator[Call | None]:
        if not owner:
            yield None
            return
        for outside in self.calls.get(self.aliases[owner][0], []):
            if is_whole:
                yield from self.consumers(outside)
            else:
                yield Call(owner, output)

    def entry(self, user: Call, value: Call) -> Call | None:
        """The placeholder through which a value enters the module that a node calls.

        A value inside a list enters with the list.
        """
        path = self.path_of(user)
        graph = self.graphs.get(path)
        if graph is None or user.node.kwargs:
            return None
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        holds = [arg is value.node or (isinstance(arg, (list, tuple)) and value.node in arg)
                 for arg in user.node.args]  # fmt: skip
        index = holds.index(True) if True in holds else len(inputs)
        return Call(path, inputs[index]) if index < len(inputs) else None

    def producer(self, call: Call) -> Call | None:
        """The node that gives the first input of this one, also across module borders."""
        value = call.node.args[0] if call.node.args else None
        if not isinstance(value, fx.Node):
            return None
        return self._origin(Call(call.owner, value))

    def _origin(self, call: Call) -> Call | None:
        if call.node.op == "placeholder":
            outside = self.calls.get(call.owner, []) if call.owner else []
            if len(outside) != 1:
                return None
            inputs = [node for node in call.node.graph.nodes if node.op == "placeholder"]
            args = outside[0].node.args
            index = inputs.index(call.node)
            value = args[index] if index < len(args) else None
            if not isinstance(value, fx.Node):
                return None
            return self._origin(Call(outside[0].owner, value))
        if call.node.op == "call_module":
            path = self.path_of(call)
            if path in self.graphs:
                output = next(iter(reversed(self.graphs[path].nodes))).args[0]
                return self._origin(Call(path, output)) if isinstance(output, fx.Node) else None
        return call


def join(owner: str, path: str) -> str:
    """The path of a child seen from the root."""
    return f"{owner}.{path}" if owner and path else owner or path


def ancestors(path: str) -> Iterator[str]:
    """The paths of the modules around this one, the root ("") last."""
    while path:
        path = path.rpartition(".")[0]
        yield path
