"""Options that a project always gives: the table [tool.orepa] of pyproject.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orepa_compiler.errors import ReparamError

FILE = "pyproject.toml"


def project_options(command: Any, folder: Path | None = None) -> dict[str, Any]:
    """The defaults of a click command, or of the commands of a group, from the project's file.

    [tool.orepa] holds options of every command that has them, [tool.orepa.export] those of one.
    The file is looked for in the current folder and those above it.
    Raises ReparamError for an option that no command has, and for a file that cannot be read.
    """
    path, table = _table(folder or Path.cwd())
    if path is None:
        return {}
    commands = getattr(command, "commands", None) or {"export": command}
    common = {key: value for key, value in table.items() if not isinstance(value, dict)}
    own = {key: value for key, value in table.items() if isinstance(value, dict)}
    known = {name: _names(each) for name, each in commands.items()}
    every = {option for names in known.values() for option in names}
    if len(commands) > 1:
        _check(path, "[tool.orepa]", common, every)
    found = {}
    for name, names in known.items():
        _check(path, f"[tool.orepa.{name}]", own.get(name, {}), {*names})
        chosen = {key: value for key, value in common.items() if key in names}
        found[name] = {names[key]: v for key, v in (chosen | own.get(name, {})).items()}
    if len(commands) > 1:
        if strange := set(own) - set(known):
            raise ReparamError(f"{path}: [tool.orepa.{min(strange)}]: there is no such command")
        return found
    return found["export"]


def _names(command: Any) -> dict[str, str]:
    """Option without its dashes -> the name of its parameter."""
    return {
        text.lstrip("-"): parameter.name
        for parameter in command.params
        for text in parameter.opts
        if text.startswith("--")
    }


def _check(path: Path, where: str, given: dict[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise ReparamError(f"{path}: {where}: no command has an option --{key}")


def _table(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    for place in (folder, *folder.parents):
        path = place / FILE
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            return (path, _parsed(path, text)) if "tool.orepa" in text else (None, {})
    return None, {}


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError as error:  # Python 3.10
        raise ReparamError(f"{path}: [tool.orepa] is read by Python 3.11 and newer") from error
    try:
        table = tomllib.loads(text).get("tool", {}).get("orepa", {})
    except tomllib.TOMLDecodeError as error:
        raise ReparamError(f"{path}: cannot be read as TOML ({error})") from error
    if not isinstance(table, dict):
        raise ReparamError(f"{path}: tool.orepa is no table; write [tool.orepa]")
    return table
