"""The floors of the package: what each file may import, read from the files themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from orepa_compiler import public

PACKAGE = "orepa_compiler"
ROOT = Path(__file__).parents[1] / PACKAGE
FILES = sorted(ROOT.rglob("*.py"))

# Floor by floor, from the lowest, the files (.py) and folders. A new file goes on the lowest floor
# that can hold it.
FLOORS = (
    ("errors", "choices", "naming", "dependencies", "progress", "containers", "files", "algebra"),
    ("capture", "branches"),
    ("generation", "rewriting"),
    ("blocks",),
    ("analysis", "defaults", "planning", "verification", "validation", "training", "quantization"),
    ("passes",),
    (
        *("preconditions", "running", "compiler", "checkpoints", "model_source", "reference"),
        *("int8", "export", "proving", "report", "testing"),
    ),
    ("__init__", "__main__", "public", "cli"),
)

ROOMS = sorted({path.parent for path in FILES})
MOST_LINES, MOST_FILES = 350, 16

OPTIONAL = {
    "PIL",
    "jinja2",
    "lightning",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "timm",
    "torchvision",
}

IMPORT_ALL_WITHOUT_OPTIONAL = """
import importlib, sys
names, blocked = [argument.split(",") for argument in sys.argv[1:]]
sys.modules.update(dict.fromkeys(blocked))  # None there makes an import fail
for name in names:
    importlib.import_module(name)
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    part = [*module.split("."), "__init__"][1]
    found = [number for number, names in enumerate(FLOORS) if part in names]
    assert found, f"{module} stands on no floor: add it to FLOORS"
    return found[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def import_nodes(tree: ast.AST, *, at_import_time: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement, or only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        is_later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if not (at_import_time and (is_later or is_type_checking(node))):
            yield from import_nodes(node, at_import_time=at_import_time)


def imported_names(path: Path, *, at_import_time: bool = False) -> set[str]:
    """What a file imports: `from a import b` is the module a.b where there is one, and else a."""
    names: set[str] = set()
    for node in import_nodes(ast.parse(path.read_text()), at_import_time=at_import_time):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        assert node.level == 0, f"{path.name}:{node.lineno}: write the import in full"
        assert node.module is not None
        for alias in node.names:
            child = f"{node.module}.{alias.name}"
            names.add(child if child in MODULES else node.module)
    return names


MODULES = {module_name(path) for path in FILES}


def own_imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    names = imported_names(path, at_import_time=at_import_time)
    return {name for name in names if name.split(".")[0] == PACKAGE}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_imports_nothing_from_a_floor_above_its_own(path: Path) -> None:
    own = floor_of(module_name(path))
    above = {name for name in own_imports(path) if floor_of(name) > own}
    assert not above, f"{module_name(path)} (floor {own}) imports {sorted(above)} from above"


def test_no_file_imports_itself_through_others() -> None:
    graph = {module_name(path): own_imports(path, at_import_time=True) for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import one another: {' -> '.join(error.args[1])}")


def test_no_file_imports_itself_through_others_for_types_or_later() -> None:
    """A late import, or one for types alone, hides a circle; it is one all the same."""
    graph = {module_name(path): own_imports(path) for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import one another: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_is_short_enough_to_be_read_at_once(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT.parent)))
def test_a_room_holds_no_more_than_one_can_keep_in_mind(room: Path) -> None:
    found = sorted(path.name for path in room.glob("*.py"))
    assert len(found) <= MOST_FILES, f"{len(found)} files: make a room of those of one subject"


def test_every_public_name_is_in_the_reference() -> None:
    names = [name for name in vars(public) if not name.startswith("_") and name != "annotations"]
    pages = (ROOT.parent / "docs" / "reference").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    assert len(names) > 40
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


def pass_of(name: str) -> str:
    """orepa_compiler.passes.collapse.folding -> orepa_compiler.passes.collapse"""
    return ".".join(name.split(".")[:3])


def test_passes_do_not_import_one_another() -> None:
    room = f"{PACKAGE}.passes"
    passes = {name: path for path in FILES if (name := module_name(path)).startswith(f"{room}.")}
    found = [
        f"{name} imports {other}"
        for name, path in passes.items()
        for other in own_imports(path)
        if other.startswith(room) and pass_of(other) != pass_of(name)
    ]
    assert passes, "there are no passes to look at"
    assert not found


@pytest.mark.parametrize("init", [p for p in FILES if p.stem == "__init__"], ids=module_name)
def test_no_module_bears_the_name_of_a_public_name_beside_it(init: Path) -> None:
    siblings = {path.stem for path in init.parent.iterdir() if path.suffix in (".py", "")}
    tree = ast.parse(init.read_text())
    public = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in import_nodes(tree, at_import_time=True):
        if isinstance(node, ast.ImportFrom) and node.module != module_name(init):
            public |= {alias.asname or alias.name for alias in node.names}
    assert not public & siblings, "one of the two would shadow the other"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_optional_packages_are_imported_only_inside_functions(path: Path) -> None:
    names = {name.split(".")[0] for name in imported_names(path, at_import_time=True)}
    assert not names & OPTIONAL


def test_every_module_imports_without_the_optional_packages() -> None:
    code = [sys.executable, "-c", IMPORT_ALL_WITHOUT_OPTIONAL]
    arguments = [",".join([PACKAGE, *sorted(MODULES)]), ",".join(sorted(OPTIONAL))]
    done = subprocess.run([*code, *arguments], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
