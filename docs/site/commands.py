"""docs/commands.md from the commands themselves: `python -m docs.site.commands` writes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from orepa_compiler.cli import app
from orepa_compiler.cli.bench import bench_command
from orepa_compiler.cli.export import export_command
from orepa_compiler.cli.given.options import EXIT_CODES
from orepa_compiler.cli.int8 import int8_command
from orepa_compiler.cli.plan import plan_command
from orepa_compiler.cli.verify import verify_command

PAGE = Path(__file__).parents[1] / "commands.md"

VERBS: dict[str, Any] = {
    "plan": plan_command,
    "export": export_command,
    "verify": verify_command,
    "bench": bench_command,
    "int8": int8_command,
}

HEAD = """# Command line

There are five commands. `orepa-export` is short for `orepa export`, and `python -m orepa_compiler`
for `orepa`. Results go to stdout, warnings and errors to stderr. Options are checked before
anything runs. Terms such as block, collapse and manifest are explained in the [glossary](words.md).

A model is named in one of these ways:

| written as | means |
|---|---|
| `torchvision:resnet50`, `timm:resnet50.a1_in1k` | the library's model, with random weights |
| `path/to/file.py:build` | the model that `build()` returns; it may import from its folder |
| `package.module:build` | the same, from an installed package or the current folder |

`--pretrained` downloads the library's weights; `--checkpoint` reads your own.

A project can set options in its `pyproject.toml`, for every command that has them or for one
command. Options given on the command line take precedence:

```toml
[tool.orepa]
input-shape = ["3x160x160"]

[tool.orepa.export]
precision = "fp16"
```

`orepa --install-completion` sets up shell completion for commands and options.
"""


def page() -> str:
    """The text of docs/commands.md."""
    group: Any = typer.main.get_command(app)
    parts = [HEAD, *(_section(name, command) for name, command in group.commands.items())]
    codes = [line.split("  ", 1) for line in EXIT_CODES.splitlines()[2:]]
    rows = "\n".join(f"| {code} | {meaning} |" for code, meaning in codes)
    parts.append(
        f"## Exit codes\n\n| code | meaning |\n|---|---|\n{rows}\n| 130 | stopped by Ctrl-C |\n"
    )
    return "\n".join(parts)


def _section(name: str, command: Any) -> str:
    text, examples = _parts(command.help)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(["orepa", name, *(p.metavar or p.name.upper() for p in arguments)])
    hints = get_type_hints(VERBS[name])
    rows = "\n".join(_row(option, hints[option.name]) for option in options if option.name in hints)
    return (
        f"## {name}\n\n    {usage} [options]\n\n{text}\n\n```\n{examples}\n```\n\n"
        f"| option | meaning |\n|---|---|\n{rows}\n"
    )


def _parts(help: str) -> tuple[str, str]:
    """What a command's help says, and its examples."""
    before, _, rest = help.partition("Examples:")
    lines = rest.strip("\n").splitlines()
    examples = [line.strip() for line in lines if line.startswith("  ")]
    after = "\n".join(line for line in lines if line.strip() and not line.startswith("  "))
    return "\n\n".join(part for part in (before.strip(), after.strip()) if part), "\n".join(
        examples
    )


def _row(option: Any, hint: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    metavar = "" if option.is_flag else option.metavar or _values(hint)
    said = re.sub(r"\s+", " ", option.help or "").replace("|", "\\|")
    shown = option.default
    default = f" Default: `{shown}`." if shown and not option.is_flag else ""
    return f"| {names}{_code(metavar)} | {said}{default} |"


def _values(hint: Any) -> str:
    """What an option takes: its choices, or what kind of value."""
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    inner = [part for part in get_args(hint) if part is not type(None)]
    if inner:
        return _values(inner[0])
    return {"int": "N", "float": "X", "Path": "FILE"}.get(hint.__name__, "TEXT")


def _code(metavar: str) -> str:
    text = metavar.replace("|", "/")  # a bar in code would end the cell, or show its backslash
    return f" `{text}`" if text else ""


if __name__ == "__main__":
    PAGE.write_text(page())
