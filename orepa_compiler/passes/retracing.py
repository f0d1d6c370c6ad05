"""Each rewrite is tried first on a copy without values, whose forwards are traced again.

A trace follows what the forward asks for now. Whether it asks for the very layer that is replaced
(and does not run the old one out of a closure), whether it looks at the layer's type, whether it
goes another way without gradients or with another argument: a second trace shows it. Whatever is
not the same keeps its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Protocol

from torch import Tensor, fx, nn

from orepa_compiler.capture import Capture, ancestors, capture
from orepa_compiler.capture.arguments import WHOLE, Arguments, bound_forward, usual_arguments
from orepa_compiler.capture.constants import OF_NUMBERS, constants_of
from orepa_compiler.capture.effects.finding import seen_of
from orepa_compiler.capture.effects.process import (
    process_answering_otherwise,
    questions_to_process,
)
from orepa_compiler.capture.recording import Recording
from orepa_compiler.capture.skeleton import meta_copy, uncollected
from orepa_compiler.capture.tracing.bytecode import defaults_of, functions_of, texts_in
from orepa_compiler.planning import Edit, Plan
from orepa_compiler.planning.overlaps import touched_by
from orepa_compiler.rewriting.holding import hold_new, holdings_of

_MOST_ROUNDS = 8
_MOST_PAIRED = 5  # arguments that are tried two by two


class TriedPass(Protocol):
    """A pass, as far as it is tried here."""

    @property
    def name(self) -> str: ...
    @property
    def training(self) -> bool | None: ...
    def plan(self, capture: Capture) -> Plan: ...
    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]: ...


@dataclass(frozen=True)
class Differences:
    """kept: module path -> why it must stay. steered: owner -> why its graph is one of several."""

    kept: Mapping[str, str]
    steered: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.kept or self.steered)


@dataclass(frozen=True)
class Retracing:
    """Plans a pass on what holds in every way that a trace can see.

    is_leaf, recording: as for the capture.
    """

    is_leaf: Callable[[nn.Module], bool]
    recording: Recording

    @uncollected()
    def planned(self, step: TriedPass, model: nn.Module, captured: Capture) -> tuple[Capture, Plan]:
        """The capture with what has to stay, and the plan of a pass on it."""
        wanted = step.plan(captured)
        if not wanted.edits or step.training is None:
            return captured, wanted
        for look in (self._other_ways, self._looks_again):
            for _ in range(_MOST_ROUNDS):
                found = look(step, model, captured, wanted)
                if not found:
                    break
                captured = replace(
                    captured,
                    kept={**captured.kept, **found.kept},
                    doubtful={**captured.doubtful, **found.steered},
                )
                wanted = step.plan(captured)
            else:
                wanted = Plan((), wanted.refusals)
        return captured, wanted

    def _captured(self, step: TriedPass, tried: nn.Module, *, flips: bool = False) -> Capture:
        """The capture of what was tried, which is a copy already."""
        return capture(
            tried, training=step.training, is_leaf=self.is_leaf, recording=self.recording,
            flips=flips, copies=False,
        )  # fmt: skip

    def _other_ways(
        self, step: TriedPass, model: nn.Module, captured: Capture, wanted: Plan
    ) -> Differences:
        """What does not hold where the model is called with other arguments."""
        kept: dict[str, str] = {}
        writes_anew = any(_writes_anew(step, edit) for edit in wanted.edits)
        for what, arguments in other_calls(captured):
            if writes_anew:  # it would know one way alone
                return Differences({"": f"written anew, it could not be called with {what}"}, {})
            recording = replace(self.recording, arguments=(arguments,))
            other = capture(
                model, training=step.training, is_leaf=self.is_leaf, recording=recording
            )
            if "unexpected keyword argument" in other.untraced.get("", ""):
                continue  # it takes no such call
            if "" in other.untraced or "" in other.doubtful:
                if "" in captured.graphs and "" not in captured.doubtful:
                    return Differences({}, {"": f"it cannot be told what it does with {what}"})
                continue
            kept |= self._lost(step, captured, other, wanted, f"with {what}")
        return Differences(kept | self._other_process(step, model, captured, wanted), {})

    def _other_process(
        self, step: TriedPass, model: nn.Module, captured: Capture, wanted: Plan
    ) -> dict[str, str]:
        """What does not hold where torch is asked whether it traces, and the like."""
        asking: dict[str, frozenset[str]] = {}
        for owner in captured.graphs:
            if questions := questions_to_process(functions_of(captured.module(owner))):
                asking[owner] = questions
        if not asking:
            return {}
        with process_answering_otherwise():
            other = capture(
                model, training=step.training, is_leaf=self.is_leaf, recording=self.recording
            )
        names = ", ".join(sorted(frozenset().union(*asking.values())))
        what = f"where {names} is answered otherwise,"
        kept = self._lost(step, captured, other, wanted, what)
        parted = {owner for owner in asking if _may_part(captured, other, owner)}
        for edit in wanted.edits:
            anew = touched_by(step, edit).owner if _is_graph(step, edit) else None
            if anew is not None and anew in parted:  # it would know one way alone
                kept[anew] = f"{what} the forward of {anew or 'the model'} goes another way"
        return kept

    def _lost(
        self, step: TriedPass, captured: Capture, other: Capture, wanted: Plan, what: str
    ) -> dict[str, str]:
        """The modules of edits that a pass would not make in another capture, and runs there."""
        kept: dict[str, str] = {}
        other = replace(other, kept={**captured.kept, **other.kept})
        there = {_key(step, edit) for edit in step.plan(other).edits}
        for edit in wanted.edits:
            modules = _modules(step, edit)
            if _key(step, edit) in there:
                continue
            # Where its forward has no graph any more, nobody knows which of them it calls.
            is_lost = any(
                owner in other.untraced and owner not in captured.untraced
                for module in modules for owner in ancestors(module)
            )  # fmt: skip
            if is_lost or any(map(other.calls.get, modules)):
                kept |= dict.fromkeys(modules, f"{what} the forward goes another way")
        return kept

    def _looks_again(
        self, step: TriedPass, model: nn.Module, captured: Capture, wanted: Plan
    ) -> Differences:
        """What is not the same once the rewrite is in place and gradients are off."""
        after = self._captured(step, self._tried(step, model, captured, wanted), flips=True)
        parted = list(_parted(captured, after))
        if not parted:
            return Differences({}, {})
        calmly = self._captured(step, self._tried(step, model, captured, wanted))
        truly = set(_parted(captured, calmly))
        steered = {
            owner: "it asks whether gradients, inference mode or autocast are on"
            for owner in parted
            if owner not in truly
        }
        kept: dict[str, str] = {}
        for owner in truly:
            reason = f"the forward of {owner or 'the model'} goes another way with it rewritten"
            if owner in calmly.untraced and owner not in captured.untraced:
                reason += f" ({calmly.untraced[owner].partition('; give inputs')[0]})"
            kept |= dict.fromkeys(_blamed(step, captured, owner, wanted), reason)
        return Differences(kept, steered)

    def _tried(
        self, step: TriedPass, model: nn.Module, captured: Capture, wanted: Plan
    ) -> nn.Module:
        product = meta_copy(model)
        holdings = holdings_of(product)
        product, _ = step.apply(product, captured, wanted)
        hold_new(product, holdings)
        return product


def other_calls(captured: Capture) -> Iterator[tuple[str, Arguments]]:
    """The ways in which the model may be called beside the one that was traced.

    Each argument that may steer is given in the other way: alone, and with each other one.
    """
    usual = captured.arguments.get("") or usual_arguments(bound_forward(captured.skeleton))
    if usual is None:
        return
    others = [*_other_values(captured, usual)]
    for change in others:
        yield _called(usual, change)
    for pair in combinations(others, 2) if len(others) <= _MOST_PAIRED else ():
        yield _called(usual, *pair)


def _other_values(captured: Capture, usual: Arguments) -> Iterator[tuple[str, str, Any]]:
    """(words, argument, another value) for each argument that may steer; a type for any of it."""
    stars = next((name for name in usual.constants if name.startswith("**")), None)
    for name, value in usual.constants.items():
        if isinstance(value, bool):
            yield f"{name}={not value}", name, not value
        elif value is None:
            yield f"{name}= something", name, Tensor
        elif isinstance(value, (int, float, str)):
            yield f"another {name} than {value!r}", name, type(value)
        elif name.startswith("*"):
            yield from [("more arguments", name, tuple)] if name != stars else []
        else:  # a member of an enum, a tuple, a function, an object that stands for "not given"
            yield f"another {name}", name, type(value)
    for name, classes in seen_of(captured.graphs.get("")).types:
        for cls in classes:
            yield f"{name} a {cls.__name__}", name, cls
    if stars is not None:
        for name, default in _further_names(captured).items():
            other = not default if isinstance(default, bool) else Tensor
            yield f"{name}={other if other is not Tensor else ' something'}", stars, {name: other}


def _further_names(captured: Capture) -> dict[str, Any]:
    """What may be given by name to a model that takes **kwargs: what some forward asks for."""
    found: dict[str, Any] = {}
    for path, graph in captured.graphs.items():
        asked = dict(seen_of(graph).asked)
        if WHOLE in asked:  # it may look for any of the names in its code
            functions = functions_of(captured.module(path))
            found |= {name: None for f in functions for name in texts_in(f.__code__)}
            found |= {name: value for f in functions for name, value in defaults_of(f).items()}
        found |= asked
        given = captured.arguments.get(path) if path else None
        for name, value in (given.constants if given else {}).items():
            if (value is None or isinstance(value, bool)) and not name.startswith("*"):
                found[name] = value if found.get(name) is None else found[name]
    return found


def _called(usual: Arguments, *changes: tuple[str, str, Any]) -> tuple[str, Arguments]:
    constants, kinds = dict(usual.constants), dict(usual.kinds)
    for _, name, value in changes:
        if isinstance(value, type):
            constants.pop(name, None)
            kinds[name] = value
        elif isinstance(value, dict):
            constants[name] = {**constants.get(name, {}), **value}
        else:
            constants[name] = value
    return " and ".join(words for words, _, _ in changes), Arguments(constants, kinds)


def _parted(before: Capture, after: Capture) -> Iterator[str]:
    """The owners whose forward is the user's own in both, and whose graphs are not the same."""
    for owner, graph in before.graphs.items():
        if owner in before.recorded or owner in before.doubtful:
            continue
        try:
            now = after.module(owner)
        except AttributeError:  # it went with what it is in
            continue
        if type(now) is not type(before.module(owner)):
            continue
        other = after.graphs.get(owner)
        if other is None or _form(graph) != _form(other):
            yield owner


def _form(graph: fx.Graph) -> tuple[Any, ...]:
    return dataflow(graph), seen_of(graph).reads, [_numbers(node) for node in graph.nodes]


def _numbers(node: fx.Node) -> Any:
    """What a tensor holds that the forward makes of numbers; they may have been counted."""
    made = node.meta.get(OF_NUMBERS)
    return None if made is None else (made.shape, made.dtype, made.flatten().tolist())


def dataflow(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Writes down what runs on what, but for what is made of weights, which blocks change."""
    constants = constants_of(graph)
    number: dict[fx.Node, int] = {}
    flow: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        is_of_weights = node in constants and not number.keys() >= set(node.all_input_nodes)
        if node.op == "get_attr" or is_of_weights:
            continue
        number[node] = len(number)

        def known(argument: fx.Node) -> Any:
            return ("value", number[argument]) if argument in number else "constant"

        arguments = fx.node.map_arg((node.args, node.kwargs), known)
        flow.append((node.op, str(node.target), str(arguments)))
    return flow


def _may_part(captured: Capture, other: Capture, owner: str) -> bool:
    """Whether a forward may go another way in another capture of the same model."""
    graph = other.graphs.get(owner)
    return graph is None or _form(graph) != _form(captured.graphs[owner])


def _writes_anew(step: TriedPass, edit: Edit) -> bool:
    """Whether an edit writes the forward of the model itself anew, from its graph."""
    return touched_by(step, edit).owner == "" and _is_graph(step, edit)


def _is_graph(step: TriedPass, edit: Edit) -> bool:
    """Whether an edit writes the forward of its owner anew."""
    return not touched_by(step, edit).modules or edit.options.get("kind") == "graph"


def _blamed(step: TriedPass, captured: Capture, owner: str, wanted: Plan) -> set[str]:
    """The modules of the edits that may have changed what a forward does: those that it calls."""
    groups = [_modules(step, edit) for edit in wanted.edits]
    edited = {path: group for group in groups for path in group}
    called = {captured.path_of(call) for calls in captured.calls.values() for call in calls
              if call.owner == owner}  # fmt: skip
    for near in (called, {path for path in edited if not owner or owner in ancestors(path)}):
        if found := near & edited.keys():
            return {module for path in found for module in edited[path]}
    return set(edited)


def _modules(step: TriedPass, edit: Edit) -> list[str]:
    return list(touched_by(step, edit).modules) or [edit.path]


def _key(step: TriedPass, edit: Edit) -> tuple[Any, ...]:
    return edit.path, edit.before, edit.after, tuple(_modules(step, edit))
