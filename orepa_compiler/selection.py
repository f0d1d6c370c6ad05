"""Which modules a user means: `where=` as a predicate or as glob patterns on module paths."""

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
    patterns = [where] if isinstance(where, str) else list(where)
    if not patterns or not all(isinstance(p, str) and p.strip("!") for p in patterns):
        raise ReparamError(
            f"where={where!r} selects nothing; give a glob such as 'layer1.*', a list of globs "
            "('!stem.*' excludes), or a function of (path, module)"
        )
    exclude = [p[1:] for p in patterns if p.startswith("!")]
    include = [p for p in patterns if not p.startswith("!")] or ["*"]
    return lambda path, module: _matches(path, include) and not _matches(path, exclude)


def _matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
