"""What the inputs and outputs of a file may be called; read before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence


def problem(names: Sequence[str], others: Sequence[str] = ()) -> str:
    """Why these cannot be the names of a file's inputs, or outputs; "" where they can.

    others: the names of the outputs, or inputs, which have to be different ones.
    """
    for name in names:
        if not name or any(character.isspace() or character == "," for character in name):
            return f"{name!r} is no name; write one word without spaces and commas for each"
        if names.count(name) > 1:
            return f"{name!r} stands there twice; give each a name of its own"
        if name in others:
            return f"{name!r} names an input and an output; give each a name of its own"
    return ""
