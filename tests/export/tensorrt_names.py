"""The public names of classic TensorRT's bindings, read without its libraries and without a GPU.

    pip download --no-deps tensorrt_cu12_bindings==10.16.1.11 && unzip tensorrt_cu12_bindings-*.whl
    python -m tests.export.tensorrt_names tensorrt_bindings "tensorrt 10.16.1.11"

writes them into tensorrt_api.json. The bindings need three libraries, of which they call a dozen
functions when they are used, none when they are imported: empty libraries do.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

RECORD = Path(__file__).with_name("tensorrt_api.json")

_PRINT_NAMES = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("tensorrt", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
kinds = json.loads(sys.argv[2])
found = {kind: dir(getattr(module, kind, module)) for kind in kinds}
print(json.dumps(found))
"""


def names_of(bindings: Path, kinds: list[str]) -> dict[str, str]:
    """The names in each class of the bindings in a folder; `module` stands for the module itself.

    Needs a C compiler, readelf and nm.
    """
    binary = bindings / "tensorrt.so"
    needed = re.findall(r"NEEDED.*\[(libnv[^\]]+)\]", _run("readelf", "-d", binary))
    undefined = re.findall(r"^\s+U (\w+)$", _run("nm", "-D", binary), re.MULTILINE)
    functions = [name for name in undefined if not name.startswith(("Py", "_"))]
    with TemporaryDirectory() as folder:
        source = Path(folder) / "empty.c"
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in functions))
        for name in needed:
            flags = ("-shared", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{name}")
            _run("gcc", *flags, "-o", Path(folder) / name, source)
        script = (sys.executable, "-c", _PRINT_NAMES, binary, json.dumps(kinds))
        found = json.loads(_run(*script, LD_LIBRARY_PATH=folder))
    return {kind: " ".join(_public(kind, names)) for kind, names in found.items()}


def _public(kind: str, names: list[str]) -> list[str]:
    # The module's own functions in small letters are numpy's types, and helpers of the package.
    shown = [name for name in names if not name.startswith("_")]
    return [name for name in shown if kind != "module" or name[0].isupper()]


def _run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def record(bindings: Path, version: str) -> None:
    """Adds the names of one version to the record."""
    known = json.loads(RECORD.read_text())
    kinds = list(next(iter(known.values())))
    known[version] = names_of(bindings, kinds)
    text = json.dumps(dict(sorted(known.items())), indent=1)
    RECORD.write_text(re.sub(r'": "', '":\n   "', text) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2])
