"""Docstrings as the reference shows them: what is said of a parameter is an item of a list.

In the source they are sentences, `name: what it is.`, one after the other.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class Parameters(griffe.Extension):
    """For mkdocstrings: rewrites the docstring of each function and class."""

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        _itemize(func, [parameter.name for parameter in func.parameters])

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        _itemize(cls, [name for name, member in cls.members.items() if member.is_attribute])


def _itemize(item: griffe.Object, names: list[str]) -> None:
    if item.docstring is not None:
        item.docstring.value = itemized(item.docstring.value, names)


def itemized(text: str, names: list[str]) -> str:
    """The text with each `name: ...` that begins a sentence on a line of its own."""
    if not names:
        return text
    name = "|".join(map(re.escape, names))
    begin = re.compile(rf"(?:^|(?<=\.)|(?<=\n))\s*((?:{name})(?:, (?:{name}))*): ")
    parts = []
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith("    "):
            paragraph = begin.sub(r"\n\n- **\1**: ", paragraph)
            paragraph = re.sub(r"\s*\bRaises (?=[A-Z]\w+)", "\n\nRaises ", paragraph)
        parts.append(paragraph.strip("\n"))
    return "\n\n".join(parts)
