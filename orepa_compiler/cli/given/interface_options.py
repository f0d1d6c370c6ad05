"""The options that say what a file's inputs and outputs are called, and which sizes it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from orepa_compiler.cli.given.engine_options import Profile, Shape
from orepa_compiler.cli.given.options import shape
from orepa_compiler.errors import ReparamError
from orepa_compiler.naming import problem

InputNames = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME", help="Names of the inputs in the files, in order."),
]
OutputNames = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME", help="Names of the outputs, in order."),
]


def split_names(option: str, text: str | None) -> tuple[str, ...]:
    """The names in `image,ids`; none where none are given. Raises ReparamError for what is none."""
    names = () if text is None else tuple(text.split(","))
    if said := problem(names):
        raise ReparamError(f"{option} {text}: {said}")
    return names


def check_names(inputs: Sequence[str], outputs: Sequence[str], shapes: Sequence[str]) -> None:
    """Raises ReparamError for a name of both, and for more or fewer names than --input-shape.

    shapes: the --input-shape that were given, if any.
    """
    if said := problem(outputs, inputs):
        raise ReparamError(f"--output-names {','.join(outputs)}: {said}")
    if inputs and shapes and len(inputs) != len(shapes):
        raise ReparamError(
            f"--input-names {','.join(inputs)}: names {len(inputs)} inputs, and --input-shape is "
            f"given for {len(shapes)}; give one name for each"
        )


def check_sizes(
    is_dynamic: bool, has_engine: bool, profile: Profile | None, shapes: Sequence[str]
) -> None:
    """Raises ReparamError where an engine of open sizes lacks its range, or cannot be compared.

    shapes: the --input-shape that were given, if any.
    """
    if not is_dynamic or not has_engine:
        return
    if profile is None:
        raise ReparamError(
            "--dynamic-size with --trt: an engine is built for a range of sizes; give "
            "--min-shapes, --opt-shapes and --max-shapes, as 1x3x224x224"
        )
    if len(shapes) == 1 and ":" not in shapes[0] and isinstance(profile, tuple):
        given = shape(shapes[0])
        if not _lies_in(given, profile):
            raise ReparamError(
                f"--input-shape {shapes[0]}: the engine is run at this shape, and takes "
                f"--min-shapes {_text(profile[0])} to --max-shapes {_text(profile[-1])}; give a "
                "shape in this range"
            )


def _lies_in(given: Shape, profile: tuple[Shape, ...]) -> bool:
    low, high = profile[0][1:], profile[-1][1:]
    fits = len(low) == len(given)
    return fits and all(a <= b <= c for a, b, c in zip(low, given, high, strict=True))


def _text(sizes: Shape) -> str:
    return "x".join(map(str, sizes))
