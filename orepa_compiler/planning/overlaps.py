"""Checks that the edits of a plan fit a model, and one another, before any is applied.

Each edit was found right by itself. Two that change one module, or one node of a forward, are not:
the second would be carried out on what the first left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from orepa_compiler.capture import Call, Capture, ancestors
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import Edit


@dataclass(frozen=True)
class Touched:
    """What an edit changes.

    modules: those that are swapped or changed, with all that is in them. nodes: those that are
    replaced in the forward of the module at `owner`, with the modules that they call.
    stays: the modules stay where they are, so that their hooks are still called.
    """

    modules: tuple[str, ...] = ()
    owner: str | None = None
    nodes: tuple[str, ...] = ()
    stays: bool = False


@runtime_checkable
class Touching(Protocol):
    """A pass that says what its edits change; else that is the module at their path alone.

    It is then asked for no more hooks there than the pass itself looks for.
    """

    def touched(self, edit: Edit) -> Touched: ...


def touched_by(step: object, edit: Edit) -> Touched:
    """What an edit of a pass changes."""
    return step.touched(edit) if isinstance(step, Touching) else Touched((edit.path,), stays=True)


def touched_modules(edit: Edit) -> tuple[str, ...]:
    """The modules of the model before it that an edit swaps, folds, or writes anew."""
    modules = tuple(edit.options.get("modules") or (edit.path,))
    if edit.options.get("kind") == "graph":
        modules += (edit.options["owner"],)
    return modules


@dataclass(frozen=True)
class _Place:
    """A module, or a node of a forward, that an edit changes."""

    path: str
    node: str = ""

    def __str__(self) -> str:
        name = self.path or "the model itself"
        return f"node {self.node} in the forward of {name}" if self.node else name


def check_edits(capture: Capture, edits: Sequence[tuple[Edit, Touched]]) -> None:
    """Nothing, where the edits can all be applied; ReparamError otherwise, naming both that clash.

    Every module must be there and have no hook that a rewrite would pass over; no module, nor a
    node of a forward, stands in two edits.
    """
    for edit, touched in edits:
        for path in (edit.path, *touched.modules):
            if path not in capture.aliases:
                message = "the plan does not fit: the model has no such module"
                raise ReparamError(message, path=path)
        for path in () if touched.stays else (*touched.modules, *_between(capture, touched)):
            if reason := capture.hook_refusal(path):
                raise ReparamError(f"the plan does not fit: {reason}", path=path)
    _check_overlap(capture, edits)


def _between(capture: Capture, touched: Touched) -> list[str]:
    """The modules whose input or output changes: they are around some of what changes, not all."""
    around = [{*ancestors(path)} for path in touched.modules]
    some = set().union(*around) - set(around[0]).intersection(*around) if around else set()
    return sorted(path for path in some if path in capture.calls)


def _check_overlap(capture: Capture, edits: Sequence[tuple[Edit, Touched]]) -> None:
    holders: dict[_Place, int] = {}
    for number, (edit, touched) in enumerate(edits):
        for place in _places(capture, touched):
            other = holders.setdefault(place, number)
            if other != number:
                raise _clash(place, edits[other][0], edit)
    for number, (edit, touched) in enumerate(edits):
        inside = [place.path for place in _places(capture, touched)]
        around = {outer for path in inside for outer in ancestors(path)}
        if touched.owner is not None:  # what is written anew may not go with another edit
            around.add(_first(capture, touched.owner))
        for place in map(_Place, sorted(around)):
            other = holders.get(place, number)
            if other != number:
                raise _clash(place, edits[other][0], edit)


def _places(capture: Capture, touched: Touched) -> Iterator[_Place]:
    paths = [*touched.modules]
    graph = None if touched.owner is None else capture.graphs.get(touched.owner)
    for node in graph.nodes if graph else ():
        if node.name in touched.nodes:
            yield _Place(str(touched.owner), node.name)
            if node.op == "call_module":
                paths.append(capture.path_of(Call(str(touched.owner), node)))
    yield from dict.fromkeys(_Place(_first(capture, path)) for path in paths)


def _first(capture: Capture, path: str) -> str:
    """The first of the paths that a module bears."""
    return capture.aliases.get(path, (path,))[0]


def _clash(place: _Place, first: Edit, second: Edit) -> ReparamError:
    return ReparamError(
        f"{place} stands in two edits of the plan: {_described(first)}, and {_described(second)}; "
        "leave one of them out"
    )


def _described(edit: Edit) -> str:
    return f"{edit.done_by} of {edit.path or 'the model itself'} ({edit.before} -> {edit.after})"
