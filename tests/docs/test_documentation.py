"""The documentation: its code runs, its pictures are true, and nothing public is missing."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import orepa_compiler as orepa
from docs.drawing.graphs import Graph, graph_of
from docs.drawing.layout import laid_out
from docs.drawing.pictures import PICTURES, linearized, plain, squeezed, unsqueezed
from docs.site.commands import page
from docs.site.parameters import itemized
from tests.docs.test_readme import BLOCK

DOCS = Path(__file__).parents[2] / "docs"


def kinds(graph: Graph) -> Counter[str]:
    return Counter(node.kind for node in graph.nodes)


def test_the_page_of_the_commands_is_what_they_say() -> None:
    written = (DOCS / "commands.md").read_text()
    assert written == page(), "run python -m docs.site.commands"


def test_the_citation_and_the_changelog_have_the_version() -> None:
    root = DOCS.parent
    assert f"\nversion: {orepa.__version__}\n" in (root / "CITATION.cff").read_text()
    assert f'version = "{orepa.__version__}"\n' in (root / "pyproject.toml").read_text()
    (latest,) = re.findall(rf"^## {orepa.__version__} - \d{{4}}-\d\d-\d\d$", _changelog(), re.M)
    assert _changelog().index(latest) == _changelog().index("\n## ") + 1


def _changelog() -> str:
    return (DOCS.parent / "CHANGELOG.md").read_text()


FUNCTIONS = [
    name for name in dir(orepa) if name[0] != "_" and inspect.isroutine(getattr(orepa, name))
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_says_with_a_verb_what_it_does_and_shows_a_call(name: str) -> None:
    text = inspect.getdoc(getattr(orepa, name)) or ""
    verb = text.split()[0]
    assert verb.endswith("s"), f"{name}: {verb}"
    assert verb.istitle()
    shown = [line for line in text.splitlines() if line.startswith("    ")]
    assert any(f"{name}(" in line for line in shown), f"{name} shows no call"


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "quickstart.md").read_text()
    blocks = list(BLOCK.finditer(text))
    assert text.count("```python") == len(blocks) > 4, "a snippet does not end"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "quickstart"}
    for block in blocks:
        exec(compile(block[1], "quickstart.md", "exec"), names)
    assert (tmp_path / "resnet18.onnx").stat().st_size > 1_000_000


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_that_of_the_pass(name: str) -> None:
    drawn = (DOCS / "pictures" / f"{name}.svg").read_text()
    assert drawn == PICTURES[name](), "run python -m docs.drawing"


def test_what_the_graphs_show() -> None:
    assert kinds(graph_of(plain())) == {"other": 2, "conv": 1, "norm": 1}
    assert kinds(graph_of(unsqueezed()))["conv"] == 2 + 4 * 2, "four branches of two layers"
    after = kinds(graph_of(squeezed()))
    assert after["conv"] == 1
    assert after["kernel"] == 10 + 6 + 1, "layers, scaling layers, the sum"
    assert kinds(graph_of(unsqueezed(orepa.DBB)))["norm"] == 6 + 1
    assert kinds(graph_of(linearized()))["norm"] == 1
    assert kinds(graph_of(orepa.collapse(squeezed())))["norm"] == 0


def test_no_two_boxes_stand_in_one_place() -> None:
    for model in (plain(), unsqueezed(), squeezed(), linearized()):
        places = laid_out(graph_of(model)).places
        for index, (column, row) in enumerate(places):
            beside = [c for c, r in places[:index] if r == row]
            assert all(abs(column - other) >= 1 for other in beside)


def test_a_picture_of_a_sum_of_feature_maps() -> None:
    graph = Graph()
    x = graph.add("x", "other")
    y = graph.add("+", "other", graph.add("conv", "conv", x), x)
    layout = laid_out(graph)
    assert [row for _, row in layout.places] == [0, 1, 2]
    assert len(layout.lines) == 3
    assert layout.lines[-1][0] == layout.places[x]
    assert layout.lines[-1][-1] == layout.places[y]
    assert layout.lines[-1][1] != layout.places[1], "the line goes beside the conv"


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    blocks = (DOCS / "blocks.md").read_text()
    for name in vars(orepa.public):
        value = getattr(orepa, name)
        if name.startswith("_") or type(value).__name__ == "module":
            continue
        if isinstance(value, orepa.Block):
            assert f"`{name}`" in blocks
        elif isinstance(value, orepa.Pipeline):
            assert f"`{name}`" in pages
        else:
            assert f"::: orepa_compiler.{name}\n" in pages, name


def test_parameters_become_a_list() -> None:
    text = "What it is.\n\na: one. b, c: two of\nthem: both.\nRaises Oops for d: e.\n\n    a: code"
    assert itemized(text, ["a", "b", "c"]) == (
        "What it is.\n\n- **a**: one.\n\n- **b, c**: two of\nthem: both.\n\n"
        "Raises Oops for d: e.\n\n    a: code"
    )
    assert itemized("a: one.", []) == "a: one."
