"""JSON that comes from outside, read into the dataclass that it was written from.

The dataclass is the schema: its fields, their types, and nothing that is not there. Whatever else
the text is, what comes out is one of our errors, and it names the field.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from orepa_compiler.errors import ReparamError

# A plan of the largest nets takes a few MB. The parser's own limit of depth is 200.
MOST_CHARACTERS = 1 << 26
SHOWN = 120  # characters of a value in a message

T = TypeVar("T")


def read_json(
    text: str | bytes, schema: type[T], *, what: str, error: type[ReparamError] = ReparamError
) -> T:
    """The value of the dataclass `schema` that `text` holds. what: how a message begins.

    Keys that the dataclass does not know are left out: a later version may write more.
    Raises `error` for everything else, with the place in the text.
    """
    parsed(text, what=what, error=error, kind=_kind(schema))
    try:
        return _adapter(schema).validate_json(text, strict=True)  # type: ignore[arg-type]
    except ValidationError as found:
        first, *others = found.errors(include_url=False)
        more = f" (and {len(others)} more)" if others else ""
        raise error(f"{what}: {_said(first)}{more}") from found


def parsed(
    text: str | bytes,
    *,
    what: str,
    error: type[ReparamError] = ReparamError,
    kind: type = dict,
) -> Any:
    """The JSON object, or list, that `text` is. Raises `error` for all else, too long or deep."""
    if len(text) > MOST_CHARACTERS:
        raise error(f"{what}: has {len(text):,} characters, more than {MOST_CHARACTERS:,}")
    try:
        data = from_json(text, allow_inf_nan=False)
    except (ValueError, TypeError) as reason:  # a lone surrogate is no text either
        raise error(f"{what}: is not whole JSON ({reason})") from reason
    if not isinstance(data, kind):
        raise error(f"{what}: is JSON, but a {type(data).__name__} and no {_NAMES[kind]}")
    return data


_NAMES: dict[type, str] = {dict: "object", list: "list"}


def _kind(schema: Any) -> type:
    return list if getattr(schema, "__origin__", None) is list else dict


def _said(problem: Any) -> str:
    field = ".".join(map(str, problem["loc"])) or "the whole"
    if problem["type"] == "missing":
        return f"{field} is missing"
    value = repr(problem["input"])
    shown = value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
    return f"{field} is {shown}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


@cache
def _adapter(schema: Hashable) -> TypeAdapter[Any]:
    adapter: Any = TypeAdapter  # its own type asks for a class
    return adapter(schema)
