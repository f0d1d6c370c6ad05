"""Selects modules by `where=`: a predicate, or glob patterns on module paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from orepa_compiler.errors import ReparamError

Predicate = Callable[[str, nn.Module], bool]
Where = str | Iterable[str] | Predicate | None


def selection(where: Where) -> Predicate:
    """The predicate that `where` stands for.

    A predicate takes (path, module). A pattern is a glob on the path ("layer1.*"), where "*" spans
    dots too; one that begins with "!" excludes. Several patterns: matched by one, excluded by none.
    None selects everything. Raises ReparamError for anything else.
    """
    if where is None:
        return lambda path, module: True
    if callable(where):
        return where
    patterns = _patterns(where)
    if not patterns or not all(isinstance(p, str) and p.strip("!") for p in patterns):
        raise ReparamError(
            f"where={where!r} selects nothing; give a glob such as 'layer1.*', a list of globs "
            "('!stem.*' excludes), or a function of (path, module)"
        )
    exclude = [p[1:] for p in patterns if p.startswith("!")]
    include = [p for p in patterns if not p.startswith("!")] or ["*"]
    return lambda path, module: _matches(path, include) and not _matches(path, exclude)


def is_asked_for(where: Where) -> bool:
    """Whether `where` names what it selects; an exclusion alone does not."""
    if where is None or callable(where):
        return where is not None
    return any(not pattern.startswith("!") for pattern in _patterns(where))


def matches_any(pattern: str, paths: Iterable[str]) -> bool:
    """Whether a pattern, also one that excludes, matches one of the paths."""
    return any(_matches(path, [pattern.removeprefix("!")]) for path in paths)


def _patterns(where: str | Iterable[str]) -> list[str]:
    if isinstance(where, str):
        return [where]
    return list(where) if isinstance(where, Iterable) else []


def _matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
