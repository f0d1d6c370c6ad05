"""Defines the kinds of edits that collapse makes, as types; in a plan they are plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import Edit


@dataclass(frozen=True)
class FoldRegion:
    """A linear region in the forward of the module at `owner`, into one conv.

    nodes: its nodes by name, in order; source: the node that they read. modules: those that go, in
    the order they run; with before and behind, norms in other modules that go too.
    """

    kind: ClassVar[str]

    owner: str
    nodes: tuple[str, ...]
    source: str
    modules: tuple[str, ...]
    before: str | None
    behind: str | None

    @property
    def layers(self) -> list[str]:
        """The modules that the nodes call, without the norms elsewhere."""
        return [path for path in self.modules if path not in (self.before, self.behind)]

    @property
    def places(self) -> tuple[str, ...]:
        """The modules that, one by one, take what the fold takes and give what it gives."""
        return self.modules


@dataclass(frozen=True)
class FoldPath(FoldRegion):
    """A region that is a chain of layers: the conv comes to stand at `at`, Identities elsewhere.

    rest: the layer whose activation stays behind, if one does.
    """

    kind = "path"

    at: str
    rest: str | None


@dataclass(frozen=True)
class FoldGraph(FoldRegion):
    """A region that is more than a chain: the forward of its owner is written anew."""

    kind = "graph"

    @property
    def places(self) -> tuple[str, ...]:
        return (self.owner,)


@dataclass(frozen=True)
class FoldBlock:
    """A block into the conv that it stands for. bias_to: the norm that takes its bias, if any."""

    kind: ClassVar[str] = "block"

    block: str
    bias_to: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.block, self.bias_to) if self.bias_to else (self.block,)

    @property
    def places(self) -> tuple[str, ...]:
        return self.modules


@dataclass(frozen=True)
class AbsorbNorm:
    """A norm into a conv that is no operator of the algebra."""

    kind: ClassVar[str] = "absorb"

    conv: str
    norm: str

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.conv, self.norm)

    @property
    def places(self) -> tuple[str, ...]:
        return self.modules


@dataclass(frozen=True)
class FoldConcatenation:
    """A norm into the convs whose concatenation it reads; within: the module around all of them."""

    kind: ClassVar[str] = "concatenation"

    convs: tuple[str, ...]
    norm: str
    within: str

    @property
    def modules(self) -> tuple[str, ...]:
        return (*self.convs, self.norm)

    @property
    def places(self) -> tuple[str, ...]:
        return (self.within,)


Fold = FoldPath | FoldGraph | FoldBlock | AbsorbNorm | FoldConcatenation


def fold_options(fold: Fold) -> dict[str, Any]:
    """A fold as the options of an Edit."""
    options: dict[str, Any] = {"kind": fold.kind}
    if isinstance(fold, FoldRegion):
        given = {f.name: getattr(fold, f.name) for f in fields(fold)}
        return options | {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    if isinstance(fold, FoldBlock):
        options |= {"owner": None, "modules": [fold.block]}
        return options | ({"bias_to": fold.bias_to} if fold.bias_to else {})
    options |= {"owner": None, "modules": list(fold.modules)}
    return options | ({"within": fold.within} if isinstance(fold, FoldConcatenation) else {})


def fold_of(edit: Edit) -> Fold:
    """The fold that an edit stands for. Raises ReparamError for one that collapse did not write."""
    kind, modules = edit.option("kind"), _paths(edit, "modules")
    if kind in (FoldPath.kind, FoldGraph.kind):
        return _region(edit, kind, modules)
    if kind == FoldBlock.kind and len(modules) == 1:
        return FoldBlock(modules[0], edit.options.get("bias_to"))
    if kind == AbsorbNorm.kind and len(modules) == 2:
        return AbsorbNorm(*modules)
    if kind == FoldConcatenation.kind and len(modules) > 1:
        return FoldConcatenation(modules[:-1], modules[-1], str(edit.option("within")))
    raise ReparamError(
        f"the plan does not fit: collapse knows no edit of kind {kind!r} for {len(modules)} "
        "modules",
        path=edit.path,
    )


def folds(edits: Sequence[Edit]) -> list[Fold]:
    """The folds of a plan's edits, in their order."""
    return [fold_of(edit) for edit in edits]


def _region(edit: Edit, kind: str, modules: tuple[str, ...]) -> FoldPath | FoldGraph:
    given: dict[str, Any] = {
        "owner": str(edit.option("owner")),
        "nodes": _paths(edit, "nodes"),
        "source": str(edit.option("source")),
        "modules": modules,
        "before": edit.options.get("before"),  # plans of before it was known have none
        "behind": edit.options.get("behind"),
    }
    if kind == FoldGraph.kind:
        return FoldGraph(**given)
    return FoldPath(**given, at=str(edit.option("at")), rest=edit.options.get("rest"))


def _paths(edit: Edit, name: str) -> tuple[str, ...]:
    found = edit.option(name)
    if not isinstance(found, (list, tuple)) or not all(isinstance(path, str) for path in found):
        raise ReparamError(
            f"the plan does not fit: {name} of its edit are {found!r}, not a list of names",
            path=edit.path,
        )
    return tuple(found)
