"""Which modules `where=` selects: globs, exclusions, predicates, and what it refuses."""

from __future__ import annotations

import pytest
from torch import nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.rewriting.selection import Where, selection

PATHS = ["", "stem", "layer1.0.conv1", "layer1.1.conv1", "layer10.0.conv1", "layer2.0.down.0"]


def selected(where: Where) -> list[str]:
    is_selected = selection(where)
    return [path for path in PATHS if is_selected(path, nn.Identity())]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, PATHS),
        ("stem", ["stem"]),
        ("layer1.*", ["layer1.0.conv1", "layer1.1.conv1"]),
        ("layer1*", ["layer1.0.conv1", "layer1.1.conv1", "layer10.0.conv1"]),
        ("*.conv1", ["layer1.0.conv1", "layer1.1.conv1", "layer10.0.conv1"]),
        ("layer?.0.*", ["layer1.0.conv1", "layer2.0.down.0"]),
        ("layer[12].0.*", ["layer1.0.conv1", "layer2.0.down.0"]),
        ("LAYER1.*", []),
        ("layer1", []),
        (["stem", "*.down.*"], ["stem", "layer2.0.down.0"]),
        (["!stem", "!layer*"], [""]),
        (["layer1*", "!layer10.*"], ["layer1.0.conv1", "layer1.1.conv1"]),
        (["!*.1.*", "layer1.*"], ["layer1.0.conv1"]),
        ("!*", []),
    ],
)
def test_patterns(where: Where, expected: list[str]) -> None:
    assert selected(where) == expected


def test_any_iterable_of_patterns_is_read_once_and_kept() -> None:
    is_selected = selection(pattern for pattern in ("stem", "layer1.*"))
    assert [is_selected("stem", nn.Identity()) for _ in range(3)] == [True] * 3
    assert is_selected("layer1.0", nn.Identity())


def test_a_predicate_sees_path_and_module() -> None:
    seen = []

    def predicate(path: str, module: nn.Module) -> bool:
        seen.append((path, module))
        return path == "a"

    layer = nn.ReLU()
    is_selected = selection(predicate)
    assert is_selected("a", layer)
    assert not is_selected("b", layer)
    assert seen == [("a", layer), ("b", layer)]


@pytest.mark.parametrize("where", ["", "!", [], ["stem", ""], ["!", "stem"], [3], 3, True])
def test_what_selects_nothing_is_refused(where: Where) -> None:
    with pytest.raises(ReparamError) as caught:
        selection(where)
    assert str(caught.value) == (
        f"where={where!r} selects nothing; give a glob such as 'layer1.*', a list of globs "
        "('!stem.*' excludes), or a function of (path, module)"
    )
